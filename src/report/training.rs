//! A run of training: a summary for the terminal, and an HTML page with its curves.

use maud::html;
use serde::{Deserialize, Serialize};

use crate::check::training::Agreement;
use crate::eval::result::Warning;
use crate::report::line_plot::{Series, line_plot};
use crate::report::{format, html as page, terminal};
use crate::train::device::name::DeviceName;
use crate::train::recipe::settings::Settings;
use crate::train::run::metrics::{EvaluationRecord, Record, StepRecord};
use crate::train::run::{Ending, Outcome};

/// What `train` found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingReport {
    /// The model's file.
    pub model: String,
    /// Where the pairs came from.
    pub pairs: String,
    /// Everything that decided the run.
    pub settings: Settings,
    /// Where and how it ran.
    pub device: String,
    /// Numbers that were trained.
    pub n_trained: usize,
    /// What came of it.
    pub outcome: Outcome,
    /// Pairs that were left out, and why.
    pub skipped: Vec<(String, usize)>,
    /// Pairs that were cut to fit.
    pub n_cut: usize,
    /// The result as llama.cpp runs it, against the trainer.
    pub agreement: Agreement,
    /// Median pairs a second over the steps.
    pub pairs_per_second: f64,
    /// The most memory that the program had, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// The file in the run's folder that holds what was trained.
    pub result: String,
}

/// Points in a curve of steps; more would hide one another.
const MOST_POINTS: usize = 60;

impl TrainingReport {
    /// What is doubtful about the run.
    pub fn warnings(&self, records: &[Record]) -> Vec<Warning> {
        let mut warnings = Vec::new();
        if self.outcome.n_steps < self.settings.warmup_steps {
            warnings.push(Warning::new(
                format!(
                    "all {} steps lie in the warm-up of {}: the learning rate was never reached",
                    self.outcome.n_steps, self.settings.warmup_steps
                ),
                "lower --warmup-steps, or train with more pairs or epochs",
            ));
        }
        let out_of_memory = records.iter().rev().find_map(|record| match record {
            Record::Placement(placement) if placement.out_of_memory => Some(placement),
            _ => None,
        });
        if let Some(placement) = out_of_memory {
            let (memory, cure) = match self.settings.device {
                DeviceName::Cpu => ("memory", "free memory, or begin with --checkpointing on"),
                DeviceName::Cuda(_) => {
                    ("the GPU's memory", "free the card's memory, or begin with a smaller --ubatch-size")
                }
            };
            warnings.push(Warning::new(
                format!(
                    "{memory} ran out after step {}: it went on with {}",
                    placement.step,
                    placement.in_words()
                ),
                cure,
            ));
        }
        if self.outcome.n_held_out == 0 {
            warnings.push(Warning::new(
                "no pair was held out: the last numbers were kept, good or not",
                "raise --held-out, or give more pairs",
            ));
        } else if self.outcome.n_held_out < 20 {
            warnings.push(Warning::new(
                format!("the best step was chosen by {} held-out pairs alone", self.outcome.n_held_out),
                "give more pairs, or raise --held-out",
            ));
        }
        let evaluations = evaluations(records);
        let last = evaluations.last().map(|e| e.eval_loss);
        if let (Some((step, _)), Some(last_look)) = (self.outcome.best, evaluations.last())
            && self.outcome.ending == Ending::Finished
            && step == last_look.step
            && evaluations.len() > 1
        {
            warnings.push(Warning::new(
                "the held-out loss was still falling at the last step",
                "more --epochs would train further",
            ));
        }
        if last.is_some_and(|loss| loss > std::f64::consts::LN_2) {
            warnings.push(Warning::new(
                "the held-out loss ended above ln 2, that of an untrained model",
                "lower --learning-rate",
            ));
        }
        warnings
    }

    /// In 80 columns.
    pub fn to_terminal(&self, records: &[Record], colour: bool) -> String {
        let mut text = self.numbers(records);
        terminal::push_warnings(&mut text, &self.warnings(records), colour);
        text
    }

    /// A line each, in 80 columns.
    fn numbers(&self, records: &[Record]) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| text.push_str(&format!("{name:<18} {value}\n"));
        let Outcome { n_steps, n_train, n_held_out, best, .. } = &self.outcome;
        row("trained", format!("{} numbers ({})", format::count(self.n_trained), self.device));
        row("pairs", format!("{n_train} trained on, {n_held_out} held out, {}", self.pairs));
        for (reason, n) in &self.skipped {
            row("", format!("{n} left out: {reason}"));
        }
        if self.n_cut > 0 {
            row("", format!("{} cut to fit", self.n_cut));
        }
        let ending = match self.outcome.ending {
            Ending::Finished => "",
            Ending::EarlyStopping => ", ended early: the held-out loss stopped falling",
        };
        row("steps", format!("{n_steps}{ending}"));
        if let Some((step, _)) = best
            && let Some(look) = evaluations(records).iter().find(|e| e.step == *step)
        {
            row(
                "best step",
                format!(
                    "{step}: held-out loss {:.4}, margin {:.3}, accuracy {:.0}%",
                    look.eval_loss,
                    look.rewards_margins,
                    100.0 * look.rewards_accuracies
                ),
            );
        }
        row("speed", format!("{:.2} pairs a second (median)", self.pairs_per_second));
        if let Some(bytes) = self.peak_rss_bytes {
            row("peak memory", format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)));
        }
        let Agreement { difference, floor, untrained, bound } = &self.agreement;
        let untrained =
            untrained.map_or(String::new(), |u| format!(", untrained {:.1e}", u.difference.mean_kl));
        row(
            "in llama.cpp",
            format!(
                "mean KL {:.1e} a token{untrained} (bound {bound:.1e}; its own noise {:.1e})",
                difference.mean_kl, floor.mean_kl
            ),
        );
        text
    }

    /// One page with the curves of loss, margins, rewards and gradient.
    pub fn to_html(&self, records: &[Record]) -> String {
        let steps: Vec<StepRecord> = records
            .iter()
            .filter_map(|record| match record {
                Record::Step(step) => Some(*step),
                Record::Evaluation(_) | Record::Placement(_) => None,
            })
            .collect();
        let evaluations = evaluations(records);
        let n_per_point = steps.len().div_ceil(MOST_POINTS).max(1);
        let of_steps = |name: &str, is_reference, of: &dyn Fn(&StepRecord) -> f64| Series {
            name: name.to_owned(),
            is_reference,
            points: steps
                .chunks(n_per_point)
                .map(|part| {
                    let mean = part.iter().map(of).sum::<f64>() / part.len() as f64;
                    (part[part.len() - 1].step as f64, mean, None, None)
                })
                .collect(),
        };
        let of_looks = |name: &str, of: &dyn Fn(&EvaluationRecord) -> f64| Series {
            name: name.to_owned(),
            is_reference: true,
            points: evaluations.iter().map(|e| (e.step as f64, of(e), None, None)).collect(),
        };
        let marked = self.outcome.best.map(|(step, _)| step as f64);
        let number = |x: f64| format!("{x:.2}");
        let plots = [
            (
                "loss",
                "Loss",
                vec![
                    of_steps("trained on", false, &|s| s.means.loss),
                    of_looks("held out", &|e| e.eval_loss),
                ],
            ),
            (
                "margin",
                "Margin: chosen less rejected reward",
                vec![
                    of_steps("trained on", false, &|s| s.means.rewards_margins),
                    of_looks("held out", &|e| e.rewards_margins),
                ],
            ),
            (
                "accuracy",
                "Share of pairs with a margin above 0",
                vec![
                    of_steps("trained on", false, &|s| s.means.rewards_accuracies),
                    of_looks("held out", &|e| e.rewards_accuracies),
                ],
            ),
            (
                "rewards",
                "Rewards of chosen (dots) and rejected (squares) answers",
                vec![
                    of_steps("chosen", false, &|s| s.means.rewards_chosen),
                    of_steps("rejected", true, &|s| s.means.rewards_rejected),
                ],
            ),
            ("gradient", "Norm of the gradient", vec![of_steps("trained on", false, &|s| s.grad_norm)]),
        ];
        let each = match n_per_point {
            1 => "a step".to_owned(),
            n => format!("the mean of {n} steps"),
        };
        let settings = serde_json::to_value(&self.settings).expect("settings are plain data");
        let settings: Vec<(String, String)> = match &settings {
            serde_json::Value::Object(map) => {
                map.iter().map(|(name, value)| (name.clone(), value.to_string())).collect()
            }
            _ => Vec::new(),
        };
        let body = html! {
            h1 { "Training of " (self.model) }
            p.answer {
                @match self.outcome.best {
                    Some((step, loss)) => {
                        "Step " (step) " of " (self.outcome.n_steps) " was kept: held-out loss " (format!("{loss:.4}"))
                        " (untrained " (format!("{:.4}", std::f64::consts::LN_2)) ")."
                    }
                    None => { (self.outcome.n_steps) " steps; no pair was held out." }
                }
            }
            (page::warnings(&self.warnings(records)))
            p.soft {
                "Dots and full lines are the pairs that were trained on, each point " (each) "; squares and dashed lines the"
                " held-out pairs. The upright line is the step that was kept."
            }
            div.plots {
                @for (id, title, series) in &plots {
                    figure {
                        figcaption { (title) }
                        (line_plot(id, title, "step", series, marked, &number))
                    }
                }
            }
            h2 { "Numbers" }
            div.scroll tabindex="0" role="region" aria-label="Numbers" { pre { (self.numbers(records)) } }
            details {
                summary { "Settings" }
                div.scroll tabindex="0" role="region" aria-label="Settings" {
                    table.settings {
                        thead { tr { th scope="col" { "Setting" } th scope="col" { "Value" } } }
                        tbody {
                            @for (name, value) in &settings { tr { th scope="row" { (name) } td { (value) } } }
                        }
                    }
                }
            }
        };
        page::page("Training", &body)
    }
}

fn evaluations(records: &[Record]) -> Vec<EvaluationRecord> {
    let looks = records.iter().filter_map(|record| match record {
        Record::Evaluation(evaluation) => Some(*evaluation),
        Record::Step(_) | Record::Placement(_) => None,
    });
    looks.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::difference::Difference;
    use crate::train::run::metrics::PlacementRecord;

    fn report() -> TrainingReport {
        let difference =
            Difference { mean_kl: 0.0, largest_kl: 0.0, largest_logit_difference: 0.0, n_tokens: 1 };
        TrainingReport {
            model: "model.gguf".into(),
            pairs: "pairs.jsonl".into(),
            settings: Settings::paper(),
            device: "cuda:0".into(),
            n_trained: 1,
            outcome: Outcome {
                ending: Ending::Finished,
                n_steps: 500,
                n_train: 400,
                n_held_out: 20,
                best: None,
                seconds: 1.0,
            },
            skipped: Vec::new(),
            n_cut: 0,
            agreement: Agreement { difference, floor: difference, untrained: None, bound: 1.0 },
            pairs_per_second: 1.0,
            peak_rss_bytes: None,
            result: "adapter.gguf".into(),
        }
    }

    #[test]
    fn memory_that_ran_out_is_told_with_what_the_run_went_on() {
        let chosen = |step, max_rows, out_of_memory| {
            Record::Placement(PlacementRecord {
                step,
                device: DeviceName::Cuda(0),
                max_rows,
                checkpointing: false,
                frozen: None,
                out_of_memory,
            })
        };
        let mut report = report();
        assert_eq!(report.warnings(&[chosen(0, 4096, false)]), []);
        let records = [chosen(0, 4096, false), chosen(7, 512, true), chosen(9, 256, true)];
        let expected = |memory: &str, cure: &str| {
            let message = format!("{memory} ran out after step 9: it went on with 256 tokens at once");
            [Warning::new(message, cure)]
        };
        let of_cpu = expected("memory", "free memory, or begin with --checkpointing on");
        assert_eq!(report.warnings(&records), of_cpu);
        report.settings.device = DeviceName::Cuda(0);
        let cure = "free the card's memory, or begin with a smaller --ubatch-size";
        assert_eq!(report.warnings(&records), expected("the GPU's memory", cure));
    }
}
