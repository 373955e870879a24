//! Computes a direction for each layer from pairs of a toxic and a benign text.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;

use crate::engine::residual::ResidualPlace;
use crate::engine::{Model, SessionOptions};
use crate::error::{Error, Result};
use crate::progress::Progress;

use super::directions::{mean_difference, scaled_principal_component};
use super::residual_streams::mean_residual_streams;

/// Tokens to read of each text at most.
const MAX_TOKENS: usize = 512;

/// A toxic text and a benign one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ContrastPair {
    /// The toxic text.
    pub toxic: String,
    /// The benign text.
    pub benign: String,
}

/// How a direction is computed from the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContrastMethod {
    /// Mean of the toxic minus mean of the benign residual streams.
    Mean,
    /// First principal component of the differences, scaled to the mean difference along it.
    PrincipalComponent,
}

/// The built-in pairs.
pub fn own() -> Vec<ContrastPair> {
    parse(Path::new("contrast.jsonl"), include_str!("contrast.jsonl"))
        .expect("a test parses the built-in pairs")
}

/// Reads pairs from JSON lines with the keys `toxic` and `benign`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`] for an invalid line, which it names, or for a file without pairs.
pub fn read(path: &Path) -> Result<Vec<ContrastPair>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<Vec<ContrastPair>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let pairs = lines.map(|(i, line)| {
        let pair: ContrastPair = serde_json::from_str(line).map_err(|e| {
            Error::input(path, Some(i + 1), format!("expected an object with \"toxic\" and \"benign\": {e}"))
        })?;
        if [&pair.toxic, &pair.benign].iter().any(|text| text.trim().is_empty()) {
            return Err(Error::input(path, Some(i + 1), "expected two texts, found an empty one"));
        }
        Ok(pair)
    });
    let pairs: Vec<ContrastPair> = pairs.collect::<Result<_>>()?;
    if pairs.is_empty() {
        return Err(Error::input(path, None, "expected at least one pair, found none"));
    }
    Ok(pairs)
}

/// Computes a direction from benign to toxic for each of `layers`, shape `[n_embd]` each.
///
/// Added with coefficient 1, a direction moves the mean benign text to the mean toxic text. To steer away
/// from toxicity, use a negative coefficient.
///
/// # Errors
/// [`Error::Setting`] if the two sides do not differ; those of [`mean_residual_streams`].
pub fn contrast_directions(
    model: &Model,
    options: &SessionOptions,
    pairs: &[ContrastPair],
    layers: RangeInclusive<usize>,
    method: ContrastMethod,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<BTreeMap<usize, Vec<f32>>> {
    let places: Vec<ResidualPlace> = layers.clone().map(ResidualPlace::AfterBlock).collect();
    let texts: Vec<&str> = pairs.iter().flat_map(|p| [p.toxic.as_str(), p.benign.as_str()]).collect();
    let streams = mean_residual_streams(model, options, &texts, &places, MAX_TOKENS, progress, interrupt)?;
    let direction = |place: usize| {
        // Texts alternate: toxic, benign, toxic, …
        let side = |side: usize| -> Vec<Vec<f32>> {
            streams.iter().skip(side).step_by(2).map(|places| places[place].clone()).collect()
        };
        let (toxic, benign) = (side(0), side(1));
        match method {
            ContrastMethod::Mean => mean_difference(&toxic, &benign),
            ContrastMethod::PrincipalComponent => scaled_principal_component(&toxic, &benign),
        }
    };
    let directions = layers.enumerate().map(|(place, layer)| {
        let direction = direction(place).map_err(|error| Error::setting("--contrast", error.to_string()))?;
        Ok((layer, direction))
    });
    directions.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_pairs_are_valid() {
        assert!(own().len() >= 20);
    }

    #[test]
    fn rejects_a_file_without_pairs_and_names_an_invalid_line() {
        let parse = |text| parse(Path::new("pairs.jsonl"), text).unwrap_err().to_string();
        assert_eq!(parse("\n\n"), "pairs.jsonl: expected at least one pair, found none");
        assert!(parse("{\"toxic\": \"a\"}").starts_with("pairs.jsonl:1: expected an object with "));
        let one_empty = "{\"toxic\": \"a\", \"benign\": \"b\"}\n{\"toxic\": \"a\", \"benign\": \" \"}";
        assert_eq!(parse(one_empty), "pairs.jsonl:2: expected two texts, found an empty one");
    }
}
