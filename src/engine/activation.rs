//! Records neuron activations while a model continues prompts greedily.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::graph::place::{InBlock, Place};
use crate::graph::recording::Recording;

use super::random::random_stream;
use super::schedule::Request;
use super::{Sampling, Session, Token, sample};

/// The recording of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptActivations {
    /// The mean activation of each neuron over the steps, `[n_neurons]`, in the order of the request.
    pub mean: Vec<f32>,
    /// The greedy continuation, one token per step.
    pub tokens: Vec<Token>,
}

/// Mean activations of neurons while the model continues each prompt greedily.
///
/// `neurons` are pairs of layer and index. Each prompt is continued for `n_predict` steps, even past an
/// end-of-generation token, and the mean is over the steps. Each step gives the activation at the last position: that
/// of the prompt's last token, then of every generated token but the last. This is the paper's protocol (section 4.2),
/// as its script does it.
///
/// If the model is steered, an activation is the neuron's own value before edits of that neuron. Edits of earlier layers
/// are part of its input. So it does not depend on the way an edit is made: callback, control vector or bias.
///
/// The session must have been opened with [`Session::open_with_callback`]. `done` is called after every group of
/// prompts, with the number of finished prompts.
///
/// Errors: [`Error::PromptTooLong`] before anything runs; [`Error::Setting`] for a neuron out of range, or for a
/// session without the callback; [`Error::Interrupted`].
pub fn record(
    session: &mut Session,
    prompts: &[Request],
    neurons: &[(usize, usize)],
    n_predict: usize,
    interrupt: &AtomicBool,
    mut done: impl FnMut(usize),
) -> Result<Vec<PromptActivations>> {
    if n_predict == 0 {
        return Err(Error::setting("-n/--n-predict", "expected at least 1, found 0"));
    }
    for prompt in prompts {
        session.check_fits(&prompt.id, prompt.tokens.len(), n_predict)?;
    }
    let n_ff = session.model().n_ff();
    if let Some((il, i)) = neurons.iter().find(|&&(il, i)| n_ff.get(il).is_none_or(|&n| i >= n)) {
        return Err(Error::setting(
            "--neurons",
            format!(
                "the model has no neuron {i} in layer {il}: it has {} layers of {n_ff:?} neurons",
                n_ff.len()
            ),
        ));
    }
    // One recording per layer. `columns[n]` is the index of neuron n's recording, and its column in it.
    let mut layers: Vec<usize> = neurons.iter().map(|&(il, _)| il).collect();
    layers.sort_unstable();
    layers.dedup();
    let mut of_layers: Vec<Vec<usize>> = vec![Vec::new(); layers.len()];
    let mut columns = Vec::with_capacity(neurons.len());
    for &(il, i) in neurons {
        let recording = layers.partition_point(|&l| l < il);
        columns.push((recording, of_layers[recording].len()));
        of_layers[recording].push(i);
    }
    let recordings = layers
        .iter()
        .zip(of_layers)
        .map(|(&il, of_layer)| Recording::new(Place::Block(il, InBlock::Neurons), Some(of_layer)))
        .collect();
    session.start_recording(recordings, false)?;
    let mut all = Vec::with_capacity(prompts.len());
    let mut result = Ok(());
    for group in prompts.chunks(session.n_parallel()) {
        let recorded = session.model().files().check_content();
        match recorded.and_then(|()| record_group(session, group, &columns, n_predict, interrupt)) {
            Ok(mut recorded) => all.append(&mut recorded),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
        done(all.len());
    }
    session.stop_recording();
    session.model().files().check_content()?;
    result.map(|()| all)
}

/// A prompt in its slot, with what was generated and summed so far.
struct Running {
    slot: usize,
    n_prompt: usize,
    tokens: Vec<Token>,
    sums: Vec<f64>,
}

fn record_group(
    session: &mut Session,
    prompts: &[Request],
    columns: &[(usize, usize)],
    n_predict: usize,
    interrupt: &AtomicBool,
) -> Result<Vec<PromptActivations>> {
    session.context.clear();
    let mut running = Vec::with_capacity(prompts.len());
    for (i, prompt) in prompts.iter().enumerate() {
        stop_if(interrupt)?;
        let row = session.load_prompt(&prompt.tokens)?;
        let mut new = Running {
            slot: i + 1,
            n_prompt: prompt.tokens.len(),
            tokens: vec![greedy(session, &row)?],
            sums: vec![0.0; columns.len()],
        };
        // Long prompts are decoded in pieces of a batch. The last piece ends with the prompt's last token.
        let last = (prompt.tokens.len() - 1) % session.context.n_batch();
        new.add(session, columns, last)?;
        session.fork_prompt(new.slot);
        running.push(new);
    }
    for _ in 1..n_predict {
        stop_if(interrupt)?;
        session.batch.clear();
        for r in &running {
            // The first token was chosen from the prompt's logits.
            let last = *r.tokens.last().expect("a running prompt has a token");
            session.batch.push(last, r.n_prompt + r.tokens.len() - 1, r.slot, true);
        }
        session.decode()?;
        for (index, r) in running.iter_mut().enumerate() {
            r.add(session, columns, index)?;
            r.tokens.push(greedy(session, session.row(index)?)?);
        }
    }
    let mean = |sums: &[f64]| sums.iter().map(|sum| (sum / n_predict as f64) as f32).collect();
    Ok(running.into_iter().map(|r| PromptActivations { mean: mean(&r.sums), tokens: r.tokens }).collect())
}

impl Running {
    /// Adds the activations recorded for token `index` of the last batch.
    fn add(&mut self, session: &mut Session, columns: &[(usize, usize)], index: usize) -> Result<()> {
        for (sum, &(recording, column)) in self.sums.iter_mut().zip(columns) {
            *sum += f64::from(session.recorded(recording, index)?[column]);
        }
        Ok(())
    }
}

fn greedy(session: &Session, row: &[f32]) -> Result<Token> {
    let mut unused = random_stream(0, "", 0);
    let choice = sample::choose(row, &Sampling::GREEDY, &mut unused);
    choice.map(|choice| choice.token).ok_or_else(|| session.no_distribution())
}

fn stop_if(interrupt: &AtomicBool) -> Result<()> {
    if interrupt.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}
