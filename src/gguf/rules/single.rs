//! Keys that one architecture asserts about.

use super::super::hparams::MAX_LAYERS;
use super::super::read::GgufFile;
use super::sizes::Sizes;
use super::{shown, wrong_key};
use crate::error::Result;

/// What a number must be.
#[derive(Debug, Clone, Copy)]
enum Rule {
    AtLeast(u64),
    Exactly(u64),
    /// Twice the width of the model.
    TwiceEmbd,
    /// All repetitions of the layers together are at most `MAX_LAYERS`.
    Loops,
}
use Rule::*;

/// Architectures, the key `{arch}.{name}`, its value if it is absent, and its rule. Without a value, llama.cpp refuses
/// a file that lacks the key.
const RULES: &[(&[&str], &str, Option<u64>, Rule)] = &[
    (EXPERTS_ONLY, "expert_count", Some(0), AtLeast(1)),
    (EXPERTS_ONLY, "expert_used_count", Some(0), AtLeast(1)),
    (&["grovemoe"], "experts_per_group", None, AtLeast(1)),
    (&["ernie4_5-moe"], "interleave_moe_layer_step", None, AtLeast(1)),
    (&["rwkv6", "rwkv7"], "token_shift_count", Some(2), Exactly(2)),
    (&["lfm2", "lfm2moe"], "shortconv.l_cache", None, AtLeast(2)),
    (&["jamba", "granitehybrid"], "ssm.inner_size", None, TwiceEmbd),
    (&["nanbeige"], "num_loops", Some(1), Loops),
    (MAMBA, "ssm.conv_kernel", None, AtLeast(1)),
    (MAMBA, "ssm.inner_size", None, AtLeast(1)),
    (MAMBA, "ssm.state_size", None, AtLeast(1)),
    (MAMBA, "ssm.time_step_rank", None, AtLeast(1)),
    (DELTA_NETS, "ssm.conv_kernel", None, AtLeast(1)),
    (RWKV, "wkv.head_size", None, AtLeast(1)),
];

/// Architectures whose layers all route to experts, or all but the first.
const EXPERTS_ONLY: &[&str] = &["smallthinker", "bailingmoe2", "grovemoe", "glm4moe", "lfm2moe"];

/// Architectures with state-space layers.
const MAMBA: &[&str] = &[
    "mamba",
    "mamba2",
    "jamba",
    "plamo2",
    "falcon-h1",
    "granitehybrid",
    "nemotron_h",
    "nemotron_h_moe",
    "qwen3next",
    "qwen35",
    "qwen35moe",
    "qwen4exp",
];

/// Other architectures with a convolution before a linear attention.
const DELTA_NETS: &[&str] = &["kimi-linear", "kimi-k3", "glm5-next", "bailingmoe3"];

const RWKV: &[&str] = &["rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"];

/// Checks the table above.
pub(super) fn check(file: &GgufFile, sizes: &Sizes) -> Result<()> {
    let arch = file.architecture()?;
    for (_, name, default, rule) in RULES.iter().filter(|(archs, ..)| archs.contains(&arch)) {
        let key = file.arch_key(name)?;
        // Of a value for each layer, the graph asserts that of the first.
        let first = match file.metadata.get(&key) {
            None => *default,
            Some(super::Value::Array(array)) => {
                array.to_i64s().and_then(|values| u64::try_from(*values.first()?).ok())
            }
            Some(_) => file.u32_if_present(&key)?.map(u64::from),
        };
        let most_loops = u64::from(MAX_LAYERS) / sizes.n_layer_main.max(1) as u64;
        let (is_sound, expected) = match (*rule, first) {
            (_, None) => continue,
            (AtLeast(min), Some(n)) => (n >= min, format!("at least {min} in {arch}")),
            (Exactly(wanted), Some(n)) => (n == wanted, format!("{wanted} in {arch}")),
            (TwiceEmbd, Some(n)) => {
                let wanted = 2 * sizes.n_embd;
                (n == wanted, format!("{wanted}, twice the width of the model"))
            }
            (Loops, Some(n)) => ((1..=most_loops).contains(&n), format!("a number from 1 to {most_loops}")),
        };
        if !is_sound {
            return Err(wrong_key(file, &key, &expected, shown(file, &key)));
        }
    }
    Ok(())
}
