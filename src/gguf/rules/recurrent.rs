//! Relations between the sizes of recurrent layers. llama.cpp divides by them.

use super::super::read::GgufFile;
use super::sizes::Sizes;
use super::wrong_key;
use crate::error::Result;

/// Architectures whose state is divided into `ssm.time_step_rank` heads in `ssm.group_count` groups.
const HEADS_IN_GROUPS: &[&str] = &[
    "mamba2",
    "falcon-h1",
    "granitehybrid",
    "nemotron_h",
    "nemotron_h_moe",
    "qwen3next",
    "qwen35",
    "qwen35moe",
];

/// Checks the sizes of state-space and RWKV layers.
pub(super) fn check(file: &GgufFile, sizes: &Sizes) -> Result<()> {
    let arch = file.architecture()?;
    let number = |name: &str| -> Result<(String, Option<u64>)> {
        let key = file.arch_key(name)?;
        let found = file.u32_if_present(&key)?.map(u64::from);
        Ok((key, found))
    };
    let (inner_key, n_inner) = number("ssm.inner_size")?;
    let (rank_key, n_rank) = number("ssm.time_step_rank")?;
    let (group_key, n_group) = number("ssm.group_count")?;
    let is_grouped = HEADS_IN_GROUPS.contains(&arch);
    if let (Some(n_inner), Some(n_rank)) = (n_inner, n_rank)
        && (is_grouped || arch == "plamo2")
        && (n_rank == 0 || !n_inner.is_multiple_of(n_rank))
    {
        let expected = format!("a divisor of {n_inner} ({inner_key:?})");
        return Err(wrong_key(file, &rank_key, &expected, n_rank));
    }
    if let (Some(n_rank), Some(n_group)) = (n_rank, n_group) {
        if is_grouped && (n_group == 0 || !n_rank.is_multiple_of(n_group)) {
            let expected = format!("a divisor of {n_rank} ({rank_key:?})");
            return Err(wrong_key(file, &group_key, &expected, n_group));
        }
        if arch == "plamo2" && n_group != 0 {
            return Err(wrong_key(file, &group_key, "0, as in every plamo2 model", n_group));
        }
    }
    let (key, head_size) = number("wkv.head_size")?;
    match head_size {
        Some(n) if n > 0 && !sizes.n_embd.is_multiple_of(n) => {
            Err(wrong_key(file, &key, &format!("a divisor of {}, the width of the model", sizes.n_embd), n))
        }
        _ => Ok(()),
    }
}
