//! Steps of the optimizers.

use crate::train::device::tests::{Random, Tested};
use crate::train::device::{AdamwStep, RmspropStep, Trained};

pub fn a_step_of_rmsprop_matches_a_hand_calculation<D: Tested>(device: &D) {
    let step = RmspropStep { learning_rate: 0.5, alpha: 0.75, epsilon: 1.0, gradient_scale: 0.5 };
    let (mut mean_square, mut value) = (vec![16.0, 0.0], vec![1.0, -2.0]);
    // Gradients are halved: 4 and -2.
    // mean_square: 0.75 * 16 + 0.25 * 16 = 16, and 0 + 0.25 * 4 = 1.
    // value: 1 - 0.5 * 4 / (4 + 1) = 0.6, and -2 + 0.5 * 2 / (1 + 1) = -1.5.
    device.rmsprop(step, &vec![8.0, -4.0], &mut mean_square, &mut value).unwrap();
    assert_eq!((mean_square, value), (vec![16.0, 1.0], vec![0.6, -1.5]));
}

pub fn steps_of_adamw_match_a_hand_calculation<D: Tested>(device: &D) {
    let step = AdamwStep {
        learning_rate: 0.5,
        beta1: 0.5,
        beta2: 0.75,
        epsilon: 0.0,
        weight_decay: 0.25,
        step: 1,
        gradient_scale: 0.5,
    };
    let (mut mean, mut mean_square, mut value) = (vec![0.0], vec![0.0], vec![8.0]);
    // The gradient is 8 / 2 = 4: mean 2, mean square 4; over 1 - 0.5 and 1 - 0.75 these are 4 and 16.
    // value: 8 - 0.5 * 0.25 * 8 = 7, then 7 - 0.5 * 4 / 4 = 6.5.
    device.adamw(step, &vec![8.0], &mut mean, &mut mean_square, &mut value).unwrap();
    assert_eq!((&mean, &mean_square, &value), (&vec![2.0], &vec![4.0], &vec![6.5]));
    // The gradient is 0: mean 1, mean square 3; over 1 - 0.25 and 1 - 0.5625 these are 4/3 and 48/7.
    // value: 6.5 * (1 - 0.125) = 5.6875, less 0.5 * (4/3) / root(48/7) = 0.254588.
    let step = AdamwStep { step: 2, ..step };
    device.adamw(step, &vec![0.0], &mut mean, &mut mean_square, &mut value).unwrap();
    assert_eq!((mean, mean_square), (vec![1.0], vec![3.0]));
    assert!((value[0] - (5.6875 - 0.254_588)).abs() < 1e-6, "{value:?}");
}

pub fn epsilon_is_added_to_the_root_and_not_under_it<D: Tested>(device: &D) {
    // AdamW's first step: 1 - 0.5 * 4 / (4 + 4) = 0.75; below the root it would be 1 - 2 / root(20).
    let step = AdamwStep {
        learning_rate: 0.5,
        beta1: 0.5,
        beta2: 0.75,
        epsilon: 4.0,
        weight_decay: 0.0,
        step: 1,
        gradient_scale: 1.0,
    };
    let (mut mean, mut mean_square, mut value) = (vec![0.0], vec![0.0], vec![1.0]);
    device.adamw(step, &vec![4.0], &mut mean, &mut mean_square, &mut value).unwrap();
    assert_eq!(value, [0.75]);
}

pub fn each_number_is_stepped_independently<D: Tested>(device: &D) {
    let (mut random, n) = (Random::new(15), 20_001);
    let (gradient, first) = (random.numbers(n), random.numbers(n));
    let rmsprop = RmspropStep { learning_rate: 0.01, alpha: 0.99, epsilon: 1e-8, gradient_scale: 1.0 };
    let adamw = AdamwStep {
        learning_rate: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 3,
        gradient_scale: 1.0,
    };
    let stepped = |gradient: &[f32], first: &[f32]| {
        let (gradient, n) = (gradient.to_vec(), first.len());
        let (mut by_rmsprop, mut by_adamw) = (first.to_vec(), first.to_vec());
        let mut states = [vec![0.5; n], vec![0.5; n], vec![0.5; n]];
        let [mean_square, mean, square] = &mut states;
        device.rmsprop(rmsprop, &gradient, mean_square, &mut by_rmsprop).unwrap();
        device.adamw(adamw, &gradient, mean, square, &mut by_adamw).unwrap();
        (by_rmsprop, by_adamw, states)
    };
    let (by_rmsprop, by_adamw, states) = stepped(&gradient, &first);
    for i in [0, 8191, 8192, 16_385, n - 1] {
        let alone = stepped(&gradient[i..i + 1], &first[i..i + 1]);
        let near = |a: f32, b: f32| (a - b).abs() <= 1e-6;
        assert!(near(by_rmsprop[i], alone.0[0]) && near(by_adamw[i], alone.1[0]), "at {i}");
        assert!((0..3).all(|state| near(states[state][i], alone.2[state][0])), "states at {i}");
    }
}

pub fn many_tensors_at_once_are_stepped_as_one_by_one<D: Tested>(device: &D) {
    // More tensors than fit into one launch, of one number and more.
    let mut random = Random::new(26);
    let lengths: Vec<usize> = (0..150).map(|i| 1 + i * i % 701).collect();
    let gradients: Vec<Vec<f32>> = lengths.iter().map(|&n| random.numbers(n)).collect();
    let squares: f64 = gradients.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum();
    let found = device.square_sum_all(&gradients).unwrap();
    assert!((found - squares).abs() <= 1e-12 * squares, "expected {squares}, found {found}");
    assert_eq!(device.square_sum_all(&[]).unwrap(), 0.0);

    let first: Vec<Vec<f32>> = lengths.iter().map(|&n| random.numbers(n)).collect();
    let rmsprop = RmspropStep { learning_rate: 0.01, alpha: 0.99, epsilon: 1e-8, gradient_scale: 0.5 };
    let adamw = AdamwStep {
        learning_rate: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 2,
        gradient_scale: 0.5,
    };
    for n_states in [1, 2] {
        let (mut together, mut alone) = (first.clone(), first.clone());
        let states: Vec<Vec<Vec<f32>>> = lengths.iter().map(|&n| vec![vec![0.25; n]; n_states]).collect();
        let (mut states_together, mut states_alone) = (states.clone(), states);
        let parts = gradients.iter().zip(&mut states_together).zip(&mut together);
        let mut all: Vec<Trained<'_, Vec<f32>>> =
            parts.map(|((gradient, states), value)| Trained { gradient, states, value }).collect();
        match n_states {
            1 => device.rmsprop_all(rmsprop, &mut all).unwrap(),
            _ => device.adamw_all(adamw, &mut all).unwrap(),
        }
        for ((gradient, states), value) in gradients.iter().zip(&mut states_alone).zip(&mut alone) {
            match states.as_mut_slice() {
                [square] => device.rmsprop(rmsprop, gradient, square, value).unwrap(),
                [mean, square] => device.adamw(adamw, gradient, mean, square, value).unwrap(),
                _ => unreachable!(),
            }
        }
        assert_eq!((together, states_together), (alone, states_alone));
    }
}
