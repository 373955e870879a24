//! Steps of the optimizers.

use rayon::prelude::*;

use crate::train::device::{AdamwStep, RmspropStep};

/// Numbers per task.
const TASK_LEN: usize = 1 << 13;

/// See [`RmspropStep`]; gradient and state have the value's length.
pub fn rmsprop(step: RmspropStep, gradient: &[f32], mean_square: &mut [f32], value: &mut [f32]) {
    let RmspropStep { learning_rate, alpha, epsilon, gradient_scale } = step;
    let parts = value.par_chunks_mut(TASK_LEN).zip(mean_square.par_chunks_mut(TASK_LEN));
    parts.zip(gradient.par_chunks(TASK_LEN)).for_each(|((value, mean_square), gradient)| {
        for ((x, m), &g) in value.iter_mut().zip(mean_square).zip(gradient) {
            let g = g * gradient_scale;
            *m = alpha * *m + (1.0 - alpha) * g * g;
            *x -= learning_rate * g / (m.sqrt() + epsilon);
        }
    });
}

/// See [`AdamwStep`]; gradient and states have the value's length.
pub fn adamw(
    step: AdamwStep,
    gradient: &[f32],
    mean: &mut [f32],
    mean_square: &mut [f32],
    value: &mut [f32],
) {
    let AdamwStep { learning_rate, beta1, beta2, epsilon, weight_decay, .. } = step;
    // In f64: at the first steps, 1 - beta2^step loses half its digits in f32.
    let correction1 = (1.0 - f64::from(beta1).powf(step.step as f64)) as f32;
    let correction2 = (1.0 - f64::from(beta2).powf(step.step as f64)).sqrt() as f32;
    let parts = value.par_chunks_mut(TASK_LEN).zip(mean.par_chunks_mut(TASK_LEN));
    let parts = parts.zip(mean_square.par_chunks_mut(TASK_LEN)).zip(gradient.par_chunks(TASK_LEN));
    parts.for_each(|(((value, mean), mean_square), gradient)| {
        for (((x, m), v), &g) in value.iter_mut().zip(mean).zip(mean_square).zip(gradient) {
            let g = g * step.gradient_scale;
            *x -= learning_rate * weight_decay * *x;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *x -= learning_rate / correction1 * *m / (v.sqrt() / correction2 + epsilon);
        }
    });
}
