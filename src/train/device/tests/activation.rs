//! Activations of the FFN.

use crate::train::device::tests::{HELD, Random, SUMS, Tested, assert_close, assert_gradient, oracle};
use crate::train::device::{Activation, Device};

/// Lengths, some around the length of a task.
const LENGTHS: [usize; 5] = [1, 15, 8192, 8193, 20_001];

fn expected(activation: Activation, x: f32) -> f64 {
    let x = f64::from(x);
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
    }
}

/// Numbers in [-8, 8), where the functions are nearly flat, nearly linear, and in between.
fn wide(random: &mut Random, n: usize) -> Vec<f32> {
    random.numbers(n).into_iter().map(|x| 8.0 * x).collect()
}

pub fn activations_match_their_formulas<D: Tested>(device: &D) {
    let mut random = Random::new(2);
    for activation in [Activation::Silu, Activation::Gelu] {
        for n in LENGTHS {
            let (gate, up) = (wide(&mut random, n), random.numbers(n));
            let what = format!("{activation:?} of {n} numbers");
            let mut y = vec![f32::NAN; n];
            device.activate(activation, &gate, None, &mut y).unwrap();
            let plain: Vec<f64> = gate.iter().map(|&x| expected(activation, x)).collect();
            assert_close(&y, &plain, SUMS / 10.0, &what);
            device.activate(activation, &gate, Some(&up), &mut y).unwrap();
            let gated: Vec<f64> = plain.iter().zip(&up).map(|(f, &u)| f * f64::from(u)).collect();
            assert_close(&y, &gated, SUMS / 10.0, &format!("{what}, gated"));
        }
    }
}

pub fn gradients_of_activations_match_finite_differences<D: Tested>(device: &D) {
    let mut random = Random::new(3);
    for activation in [Activation::Silu, Activation::Gelu] {
        for n in [1, 15, 33] {
            let (gate, up, dy) = (wide(&mut random, n), random.numbers(n), random.numbers(n));
            let forward = |gate: &Vec<f32>, up: Option<&Vec<f32>>| {
                let mut y = vec![0.0; n];
                oracle().activate(activation, gate, up, &mut y).unwrap();
                y
            };
            let mut dgate = vec![HELD; n];
            device.activate_back(activation, &gate, None, &dy, &mut dgate, None).unwrap();
            assert_gradient(&dgate, &gate, &dy, |gate| forward(gate, None), "plain");
            let (mut dgate, mut dup) = (vec![HELD; n], vec![HELD; n]);
            device.activate_back(activation, &gate, Some(&up), &dy, &mut dgate, Some(&mut dup)).unwrap();
            assert_gradient(&dgate, &gate, &dy, |gate| forward(gate, Some(&up)), "gated");
            assert_gradient(&dup, &up, &dy, |up| forward(&gate, Some(up)), "up");
        }
    }
}

pub fn gradients_of_many_numbers_match_one_at_a_time<D: Tested>(device: &D) {
    let mut random = Random::new(4);
    let n = 20_001;
    let (gate, up, dy) = (wide(&mut random, n), random.numbers(n), random.numbers(n));
    let (mut dgate, mut dup, mut plain) = (vec![HELD; n], vec![HELD; n], vec![HELD; n]);
    let activation = Activation::Gelu;
    device.activate_back(activation, &gate, Some(&up), &dy, &mut dgate, Some(&mut dup)).unwrap();
    device.activate_back(activation, &gate, None, &dy, &mut plain, None).unwrap();
    for i in [0, 8191, 8192, 16_384, n - 1] {
        let (gate, up, dy) = (vec![gate[i]], vec![up[i]], vec![dy[i]]);
        let (mut of_gate, mut of_up, mut of_plain) = (vec![HELD], vec![HELD], vec![HELD]);
        device.activate_back(activation, &gate, Some(&up), &dy, &mut of_gate, Some(&mut of_up)).unwrap();
        device.activate_back(activation, &gate, None, &dy, &mut of_plain, None).unwrap();
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(
            near(dgate[i], of_gate[0]) && near(dup[i], of_up[0]) && near(plain[i], of_plain[0]),
            "at {i}"
        );
    }
}
