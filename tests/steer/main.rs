//! What neurons write, and models with it baked in.

mod weights;
