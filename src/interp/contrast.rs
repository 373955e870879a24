//! Computes a direction for each layer from pairs of a toxic and a benign text.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::engine::residual::ResidualPlace;
use crate::engine::{Model, SessionOptions};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::text::chat_markers;
use crate::text::rows::{self, BENIGN, Column, Ignored, Rows, TOXIC};

use super::directions::{mean_difference, scaled_principal_component};
use super::residual_streams::mean_residual_streams;

/// Tokens to read of each text at most.
const MAX_TOKENS: usize = 512;

/// A toxic text and a benign one.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    parse(Path::new("contrast.jsonl"), include_bytes!("contrast.jsonl"), &ContrastColumns::default())
        .expect("a test parses the built-in pairs")
}

/// Columns of pairs that the user names. `None` means the usual names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContrastColumns {
    /// The toxic text.
    pub toxic: Option<String>,
    /// The benign text.
    pub benign: Option<String>,
}

/// Reads pairs from a file of any form of [`rows`](crate::text::rows), with the columns `toxic` and `benign`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`] for an invalid row, whose line it names, or for a file without pairs.
pub fn read(path: &Path, columns: &ContrastColumns) -> Result<Vec<ContrastPair>> {
    let named = [&columns.toxic, &columns.benign].map(Option::as_deref);
    pairs(path, Rows::open(path, "pairs", &named)?, columns)
}

fn parse(path: &Path, bytes: &[u8], columns: &ContrastColumns) -> Result<Vec<ContrastPair>> {
    pairs(path, Rows::new(path, "pairs", Box::new(bytes), None, &[])?, columns)
}

fn pairs(path: &Path, rows: Rows<'_>, columns: &ContrastColumns) -> Result<Vec<ContrastPair>> {
    let rows = rows.limited();
    let is_plain = rows.is_plain();
    let (mut pairs, mut ignored, mut marked) =
        (Vec::new(), Ignored::default(), chat_markers::Count::default());
    for row in rows {
        let row = row?;
        if is_plain
            && row.fields.values().all(|text| text.as_str().is_some_and(|text| text.trim().is_empty()))
        {
            continue;
        }
        let refuse = |reason: String| Error::input(path, Some(row.line), reason);
        let text = |column: Column, chosen: Option<&str>| {
            let found = column.find(&row.fields, chosen).ok_or_else(|| {
                let (reason, hint) = column.absent(&row.fields, chosen);
                refuse(reason).with_hint(hint)
            });
            let (name, value) = found?;
            let text = rows::text(name, value);
            let text = text.map_err(|(reason, hint)| refuse(reason).with_optional_hint(hint))?;
            match text.trim().is_empty() {
                true => Err(refuse("expected two texts, found an empty one".into())),
                false => Ok((name, text.to_owned())),
            }
        };
        let (toxic_name, toxic) = text(TOXIC, columns.toxic.as_deref())?;
        let (benign_name, benign) = text(BENIGN, columns.benign.as_deref())?;
        ignored.add(&row.fields, &[toxic_name, benign_name]);
        marked.add(&[&toxic, &benign]);
        pairs.push(ContrastPair { toxic, benign });
    }
    if pairs.is_empty() {
        return Err(Error::input(path, None, "expected at least one pair, found none"));
    }
    ignored.log(path);
    marked.warn(path, "pairs");
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
        let parse = |text: &str| {
            let parsed = parse(Path::new("pairs.jsonl"), text.as_bytes(), &ContrastColumns::default());
            parsed.unwrap_err().to_string()
        };
        assert_eq!(parse("\n\n"), "pairs.jsonl: expected at least one pair, found none");
        assert!(
            parse("{\"toxic\": \"a\"}")
                .starts_with("pairs.jsonl:1: expected a benign text in a column such as \"benign\"")
        );
        let one_empty = "{\"toxic\": \"a\", \"benign\": \"b\"}\n{\"toxic\": \"a\", \"benign\": \" \"}";
        assert_eq!(parse(one_empty), "pairs.jsonl:2: expected two texts, found an empty one");
    }
}
