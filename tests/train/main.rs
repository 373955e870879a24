//! The trainer against goldens that `scripts/make_train_goldens.py` made with PyTorch and TRL.

mod golden;
