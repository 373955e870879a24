//! Mean residual streams of texts, the features for probes, directions and retrieval.

use std::sync::atomic::AtomicBool;

use crate::engine::residual::{self, ResidualPlace};
use crate::engine::{Model, Session, SessionOptions, Token};
use crate::error::{Error, Result};
use crate::progress::{Progress, advance_to};

/// Default of `-np`. More sequences are not faster, because only a few texts fit into a batch.
const PARALLEL_TEXTS: usize = 32;

/// Averages the residual stream over each text's tokens at each of `places`.
///
/// Returns shape `[n_texts][n_places][n_embd]`. Only the first `max_tokens` tokens of a text are read;
/// `progress` reports how many texts were truncated.
///
/// # Errors
/// [`Error::Setting`] if `max_tokens` is 0; those of [`residual::record`].
pub fn mean_residual_streams(
    model: &Model,
    options: &SessionOptions,
    texts: &[&str],
    places: &[ResidualPlace],
    max_tokens: usize,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<Vec<Vec<Vec<f32>>>> {
    check_max_tokens(max_tokens)?;
    model.vocabulary().check_nfc(texts.iter().copied());
    let mut n_truncated = 0;
    let tokens = texts.iter().map(|text| {
        let mut tokens = model.tokenize_prompt(text)?;
        n_truncated += usize::from(tokens.len() > max_tokens);
        tokens.truncate(max_tokens);
        Ok(tokens)
    });
    let tokens: Vec<Vec<Token>> = tokens.collect::<Result<_>>()?;
    if n_truncated > 0 {
        progress.say(&format!("truncated {n_truncated} texts of more than {max_tokens} tokens"));
    }
    let longest = tokens.iter().map(Vec::len).max().unwrap_or(1);
    let n_parallel = options.n_parallel.or(Some(PARALLEL_TEXTS));
    let options = SessionOptions { n_parallel, ..options.clone() };
    let mut session = Session::open_with_callback(model, &options, longest)?;
    progress.start("texts", tokens.len() as u64, 0);
    let means = residual::record(&mut session, &tokens, places, interrupt, advance_to(progress))?;
    progress.finish();
    Ok(means)
}

/// Refuses `--max-tokens 0`, so that callers can fail before they load a model.
///
/// # Errors
/// [`Error::Setting`].
pub fn check_max_tokens(max_tokens: usize) -> Result<()> {
    if max_tokens == 0 {
        return Err(Error::setting("--max-tokens", "expected at least 1, found 0"));
    }
    Ok(())
}
