//! The report of a training run: a summary for the terminal, and an HTML page with curves.

use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use crate::check::training::Agreement;
use crate::eval::result::Warning;
use crate::report::axis::AxisUnit;
use crate::report::line_plot::{Series, line_plot};
use crate::report::{format, html as page, terminal};
use crate::text::printable;
use crate::train::device::name::DeviceName;
use crate::train::recipe::settings::Settings;
use crate::train::run::metrics::{EvaluationRecord, PlacementRecord, Record, StepRecord};
use crate::train::run::{Ending, Outcome};

/// The results of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingReport {
    /// File name of the model.
    pub model: String,
    /// Source of the pairs.
    pub pairs: String,
    /// All settings of the run.
    pub settings: Settings,
    /// The device and its precision.
    pub device: String,
    /// Number of trained parameters.
    pub n_trained: usize,
    /// How the run ended.
    pub outcome: Outcome,
    /// Reasons for skipping pairs, each with the number of pairs.
    pub skipped: Vec<(String, usize)>,
    /// Pairs that were truncated.
    pub n_cut: usize,
    /// The comparison of the result in llama.cpp with the trainer.
    pub agreement: Agreement,
    /// Median throughput of the steps.
    pub pairs_per_second: f64,
    /// Peak resident memory of the process; `None` if the system does not report it.
    pub peak_rss_bytes: Option<u64>,
    /// File name of the trained result in the run's folder.
    pub result: String,
}

/// Maximum points of a curve; more would overlap.
const MAX_POINTS: usize = 60;

/// Minimum number of held-out pairs for a reliable choice of the best step.
const FEW_HELD_OUT: usize = 20;

impl TrainingReport {
    /// Reasons to doubt the run, with advice.
    pub fn warnings(&self, records: &[Record]) -> Vec<Warning> {
        let mut warnings = Vec::new();
        if self.outcome.n_steps < self.settings.warmup_steps {
            warnings.push(Warning::new(
                format!(
                    "all {} steps are within the warm-up of {}: the peak learning rate was never reached",
                    self.outcome.n_steps, self.settings.warmup_steps
                ),
                "lower --warmup-steps, or train with more pairs or epochs",
            ));
        }
        let out_of_memory = records.iter().rev().find_map(|record| match record {
            Record::Placement(placement) if placement.out_of_memory => Some(placement),
            _ => None,
        });
        warnings.extend(out_of_memory.map(|placement| self.out_of_memory(placement)));
        if let Some(too_small) = self.agreement.too_small() {
            warnings.push(Warning::new(
                too_small,
                "the result is kept, but may change nothing: train more steps, or raise --learning-rate",
            ));
        }
        if self.outcome.n_held_out == 0 {
            warnings.push(Warning::new(
                "no pair was held out: the values of the last step were kept, even if they are not the best",
                "raise --held-out, or use more pairs",
            ));
        } else if self.outcome.n_held_out < FEW_HELD_OUT {
            warnings.push(Warning::new(
                format!("the best step was chosen on only {} held-out pairs", self.outcome.n_held_out),
                "use more pairs, or raise --held-out",
            ));
        }
        let evaluations = evaluations(records);
        if let (Some((step, _)), Some(last)) = (self.outcome.best, evaluations.last())
            && self.outcome.ending == Ending::Finished
            && step == last.step
            && evaluations.len() > 1
        {
            warnings.push(Warning::new(
                "the held-out loss was still falling at the last step",
                "train longer with more --epochs",
            ));
        }
        if evaluations.last().is_some_and(|last| last.eval_loss > std::f64::consts::LN_2) {
            warnings.push(Warning::new(
                "the held-out loss ended above ln 2, the loss of the untrained model",
                "lower --learning-rate",
            ));
        }
        warnings
    }

    fn out_of_memory(&self, placement: &PlacementRecord) -> Warning {
        let (memory, advice) = match self.settings.device {
            DeviceName::Cpu => ("memory", "free memory, or start with --checkpointing on"),
            DeviceName::Cuda(_) => ("GPU memory", "free GPU memory, or start with a smaller --ubatch-size"),
        };
        let (step, in_words) = (placement.step, placement.in_words());
        Warning::new(format!("{memory} ran out after step {step}: the run continued with {in_words}"), advice)
    }

    /// The summary for the terminal, in 80 columns.
    pub fn to_terminal(&self, records: &[Record], colour: bool) -> String {
        let mut text = self.summary(records);
        terminal::push_warnings(&mut text, &self.warnings(records), colour);
        text
    }

    /// One result per line, in 80 columns.
    fn summary(&self, records: &[Record]) -> String {
        let mut text = String::new();
        let mut row =
            |name: &str, value: String| text.push_str(&format!("{name:<18} {}\n", printable(&value)));
        let Outcome { n_steps, n_train, n_held_out, best, .. } = &self.outcome;
        row("trained", format!("{} parameters ({})", format::count(self.n_trained), self.device));
        row("pairs", format!("{n_train} for training, {n_held_out} held out, {}", self.pairs));
        for (reason, n) in &self.skipped {
            row("", format!("{n} skipped: {reason}"));
        }
        if self.n_cut > 0 {
            row("", format!("{} truncated", self.n_cut));
        }
        let ending = match self.outcome.ending {
            Ending::Finished => "",
            Ending::EarlyStopping => ", stopped early: the held-out loss stopped falling",
        };
        row("steps", format!("{n_steps}{ending}"));
        if let Some((step, _)) = best
            && let Some(evaluation) = evaluations(records).iter().find(|e| e.step == *step)
        {
            row(
                "best step",
                format!(
                    "{step}: held-out loss {:.4}, margin {:.3}, accuracy {:.0}%",
                    evaluation.eval_loss,
                    evaluation.rewards_margins,
                    100.0 * evaluation.rewards_accuracies
                ),
            );
        }
        // 0 if the metrics of all steps were lost.
        if self.pairs_per_second > 0.0 {
            row("speed", format!("{:.2} pairs/s (median)", self.pairs_per_second));
        }
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

    /// An HTML page with the curves of loss, margin, accuracy, rewards and gradient norm.
    pub fn to_html(&self, records: &[Record]) -> String {
        let curves = Curves::of(records);
        let marked = self.outcome.best.map(|(step, _)| step as f64);
        let point = match curves.steps_per_point {
            1 => "a step".to_owned(),
            n => format!("the mean of {n} steps"),
        };
        let body = html! {
            h1 { "Training of " (printable(&self.model)) }
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
                "Dots and solid lines show the training pairs; each point is " (point) ". Squares and dashed lines show the"
                " held-out pairs. The vertical line marks the step that was kept."
            }
            div.plots {
                @for (id, title, series) in &curves.plots() {
                    figure {
                        figcaption { (title) }
                        (line_plot(id, title, "step", series, marked, AxisUnit::Plain))
                    }
                }
            }
            h2 { "Numbers" }
            div.scroll tabindex="0" role="region" aria-label="Numbers" { pre { (self.summary(records)) } }
            (self.settings_table())
        };
        page::page("Training", &body)
    }

    fn settings_table(&self) -> Markup {
        let settings = serde_json::to_value(&self.settings).expect("settings are plain data");
        let settings: Vec<(String, String)> = match &settings {
            serde_json::Value::Object(map) => {
                map.iter().map(|(name, value)| (name.clone(), value.to_string())).collect()
            }
            _ => Vec::new(),
        };
        html! {
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
        }
    }
}

/// The steps and evaluations of a run, as curves.
struct Curves {
    steps: Vec<StepRecord>,
    evaluations: Vec<EvaluationRecord>,
    /// Steps averaged into one point.
    steps_per_point: usize,
}

impl Curves {
    fn of(records: &[Record]) -> Curves {
        let steps: Vec<StepRecord> = records
            .iter()
            .filter_map(|record| match record {
                Record::Step(step) => Some(step.clone()),
                Record::Evaluation(_) | Record::Placement(_) => None,
            })
            .collect();
        let steps_per_point = steps.len().div_ceil(MAX_POINTS).max(1);
        Curves { steps, evaluations: evaluations(records), steps_per_point }
    }

    /// Each plot's id, title and series.
    fn plots(&self) -> [(&'static str, &'static str, Vec<Series>); 5] {
        [
            (
                "loss",
                "Loss",
                vec![
                    self.of_steps("training", false, |s| s.means.loss),
                    self.of_evaluations("held out", |e| e.eval_loss),
                ],
            ),
            (
                "margin",
                "Margin: chosen minus rejected reward",
                vec![
                    self.of_steps("training", false, |s| s.means.rewards_margins),
                    self.of_evaluations("held out", |e| e.rewards_margins),
                ],
            ),
            (
                "accuracy",
                "Reward accuracy: fraction of pairs with a margin above 0",
                vec![
                    self.of_steps("training", false, |s| s.means.rewards_accuracies),
                    self.of_evaluations("held out", |e| e.rewards_accuracies),
                ],
            ),
            (
                "rewards",
                "Rewards of chosen (dots) and rejected (squares) answers",
                vec![
                    self.of_steps("chosen", false, |s| s.means.rewards_chosen),
                    self.of_steps("rejected", true, |s| s.means.rewards_rejected),
                ],
            ),
            ("gradient", "Gradient norm", vec![self.of_steps("training", false, |s| s.grad_norm)]),
        ]
    }

    fn of_steps(&self, name: &str, is_reference: bool, value: fn(&StepRecord) -> f64) -> Series {
        let point = |part: &[StepRecord]| {
            let mean = part.iter().map(value).sum::<f64>() / part.len() as f64;
            (part[part.len() - 1].step as f64, mean, None, None)
        };
        let points = self.steps.chunks(self.steps_per_point).map(point).collect();
        Series { name: name.to_owned(), is_reference, points }
    }

    fn of_evaluations(&self, name: &str, value: fn(&EvaluationRecord) -> f64) -> Series {
        let points = self.evaluations.iter().map(|e| (e.step as f64, value(e), None, None)).collect();
        Series { name: name.to_owned(), is_reference: true, points }
    }
}

fn evaluations(records: &[Record]) -> Vec<EvaluationRecord> {
    let evaluations = records.iter().filter_map(|record| match record {
        Record::Evaluation(evaluation) => Some(*evaluation),
        Record::Step(_) | Record::Placement(_) => None,
    });
    evaluations.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::difference::Difference;

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
                held_out_indices: vec![3],
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
    fn a_warning_names_the_last_placement_after_memory_ran_out() {
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
        let expected = |memory: &str, advice: &str| {
            let message =
                format!("{memory} ran out after step 9: the run continued with 256 tokens per pass");
            [Warning::new(message, advice)]
        };
        let of_cpu = expected("memory", "free memory, or start with --checkpointing on");
        assert_eq!(report.warnings(&records), of_cpu);
        report.settings.device = DeviceName::Cuda(0);
        let advice = "free GPU memory, or start with a smaller --ubatch-size";
        assert_eq!(report.warnings(&records), expected("GPU memory", advice));
    }
}
