//! Finds what to change in a model.
