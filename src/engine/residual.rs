//! Records the mean residual stream of each text.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::graph::place::{InBlock, Phase, Place};
use crate::graph::recording::Recording;

use super::logprob::MOST_LOGIT_BYTES;
use super::{Session, Token};

/// A place at which the residual stream is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResidualPlace {
    /// Before the first block: the embeddings, as the first block receives them.
    Embedding,
    /// After this block, counted from 0.
    AfterBlock(usize),
    /// After the last block and the final norm: the input of the output matrix.
    AfterFinalNorm,
}

impl ResidualPlace {
    /// All `n_layer + 2` places of a model, in order.
    pub fn all(n_layer: usize) -> Vec<ResidualPlace> {
        let blocks = (0..n_layer).map(ResidualPlace::AfterBlock);
        [ResidualPlace::Embedding].into_iter().chain(blocks).chain([ResidualPlace::AfterFinalNorm]).collect()
    }

    fn place(self) -> Place {
        match self {
            ResidualPlace::Embedding => Place::Embedding,
            ResidualPlace::AfterBlock(il) => Place::Block(il, InBlock::Output),
            ResidualPlace::AfterFinalNorm => Place::FinalNorm,
        }
    }
}

/// The mean residual stream of each text at each place, `[texts][places][n_embd]`.
///
/// The mean is over all tokens of a text, including BOS. If the model is steered, the residual stream after a block is
/// the one that the next block receives: after all edits, by callback, control vector or bias. The session must have been opened with
/// [`Session::open_with_callback`]. The graph ends at the last place, so no logits are computed. `done` is called
/// after every batch, with the number of finished texts.
///
/// Errors: [`Error::PromptTooLong`] before anything runs; [`Error::Setting`] for a layer out of range, or for a
/// session without the callback; [`Error::Interrupted`].
pub fn record(
    session: &mut Session,
    texts: &[Vec<Token>],
    places: &[ResidualPlace],
    interrupt: &AtomicBool,
    mut done: impl FnMut(usize),
) -> Result<Vec<Vec<Vec<f32>>>> {
    for (i, text) in texts.iter().enumerate() {
        session.check_fits(&format!("text {}", i + 1), text.len(), 0)?;
    }
    let n_layer = session.model().n_layer();
    for place in places {
        if let ResidualPlace::AfterBlock(il) = place
            && *il >= n_layer
        {
            let reason = format!("expected a layer from 0 to {}, found {il}", n_layer - 1);
            return Err(Error::setting("--layer", reason));
        }
    }
    let recordings = places.iter().map(|place| Recording::new(place.place(), None)).collect();
    session.start_recording(recordings, true)?;
    let result = record_all(session, texts, places.len(), interrupt, &mut done);
    session.stop_recording();
    session.model().files().check_content()?;
    result
}

fn record_all(
    session: &mut Session,
    texts: &[Vec<Token>],
    n_places: usize,
    interrupt: &AtomicBool,
    done: &mut impl FnMut(usize),
) -> Result<Vec<Vec<Vec<f32>>>> {
    // llama.cpp allocates logits for every output, even if none are computed.
    let row_bytes = session.model().n_vocab() * size_of::<f32>();
    let most_tokens = (MOST_LOGIT_BYTES / row_bytes.max(1)).clamp(1, session.context.n_batch());
    let n_slots = session.most_together();
    let n_embd = session.model().n_embd();
    let mut means: Vec<Vec<Vec<f32>>> = vec![Vec::new(); texts.len()];
    // A micro-batch takes the same number of tokens from each of its sequences, so group texts of similar length.
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&text| texts[text].len());
    let mut start = 0;
    while start < order.len() {
        // Take as many whole texts as fit. A text longer than a batch is decoded alone, in pieces.
        let mut end = start + 1;
        let mut n_tokens = texts[order[start]].len();
        while end < order.len() && end - start < n_slots && n_tokens + texts[order[end]].len() <= most_tokens
        {
            n_tokens += texts[order[end]].len();
            end += 1;
        }
        session.context.clear();
        // [slots][places][n_embd], only of this group: the sums of a hundred thousand texts would take gigabytes.
        let mut sums = vec![vec![vec![0f64; n_embd]; n_places]; end - start];
        let of_slots = order[start..end].iter().enumerate();
        let tokens: Vec<(usize, usize, Token)> = of_slots
            .flat_map(|(slot, &text)| {
                texts[text].iter().enumerate().map(move |(at, &token)| (slot, at, token))
            })
            .collect();
        for chunk in tokens.chunks(most_tokens) {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            session.batch.clear();
            for &(slot, at, token) in chunk {
                session.batch.push(token, at, slot, true);
            }
            session.decode_as(Phase::Prompt)?;
            for (index, &(slot, ..)) in chunk.iter().enumerate() {
                for (place, sum) in sums[slot].iter_mut().enumerate() {
                    let row = session.recorded(place, index)?;
                    sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
                }
            }
        }
        for (sums, &text) in sums.into_iter().zip(&order[start..end]) {
            let n = texts[text].len() as f64;
            let mean = |sum: Vec<f64>| sum.into_iter().map(|x| (x / n) as f32).collect();
            means[text] = sums.into_iter().map(mean).collect();
        }
        start = end;
        done(start);
    }
    Ok(means)
}
