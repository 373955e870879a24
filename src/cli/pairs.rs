//! `pairs`: makes preference pairs from a model's own continuations, as JSON lines.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::error::{Error, Result};
use crate::file;
use crate::file::output::Paths;
use crate::report::pairs as report;
use crate::score;
use crate::study::make_pairs::choose::Rules;
use crate::study::make_pairs::{self, MakePairsRequest, SteeredSide};

use super::arguments::{EngineArguments, PromptArguments, SamplingArguments};
use super::print::{self, Rows, print};
use super::progress::Shown;
use super::steering::SteeringArguments;

/// Arguments of `pairs`.
#[derive(Debug, Args)]
pub struct PairsCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// File to write (JSON lines), once all pairs are made [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    sides: SideArguments,
    #[command(flatten)]
    rules: RuleArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// The steering of each side of a pair.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sides")]
struct SideArguments {
    /// Steering for samples of the chosen side; repeatable [default: unsteered]
    #[arg(long, value_name = "FILE[:COEF]")]
    steer_chosen: Vec<String>,
    /// Steering for samples of the rejected side; repeatable [default: unsteered]
    #[arg(long, value_name = "FILE[:COEF]")]
    steer_rejected: Vec<String>,
    /// Accept files made for another quantisation or fine-tune of this model
    #[arg(long)]
    force: bool,
}

const DEFAULT: Rules = Rules::DEFAULT;

/// The requirements for a pair.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pairs")]
struct RuleArguments {
    /// Scorer; repeatable: all scorers that cover the prompt's language must agree
    #[arg(long, value_name = "NAME", default_value = score::LEXICAL)]
    scorer: Vec<String>,
    /// Maximum number of pairs per prompt
    #[arg(long, value_name = "N", default_value_t = DEFAULT.per_prompt)]
    per_prompt: usize,
    /// Minimum difference in toxicity between rejected and chosen
    #[arg(long, value_name = "T", default_value_t = DEFAULT.min_margin, allow_negative_numbers = true)]
    min_margin: f64,
    /// A chosen continuation must be less toxic than this
    #[arg(long, value_name = "T", default_value_t = DEFAULT.chosen_below, allow_negative_numbers = true)]
    chosen_below: f64,
    /// A rejected continuation must be at least this toxic
    #[arg(long, value_name = "T", default_value_t = DEFAULT.rejected_above, allow_negative_numbers = true)]
    rejected_above: f64,
    /// Minimum number of tokens in a continuation
    #[arg(long, value_name = "N", default_value_t = DEFAULT.min_tokens)]
    min_tokens: u32,
    /// Maximum ratio of the two lengths, in tokens, longer to shorter
    #[arg(long, value_name = "R", default_value_t = DEFAULT.max_length_ratio, allow_negative_numbers = true)]
    max_length_ratio: f64,
    /// Minimum mean log-prob per token under the unsteered model, in nats
    #[arg(long, value_name = "L", default_value_t = DEFAULT.min_logprob, allow_negative_numbers = true)]
    min_logprob: f64,
    /// Maximum difference in mean log-prob between the two, in nats per token
    #[arg(long, value_name = "L", default_value_t = DEFAULT.max_logprob_gap, allow_negative_numbers = true)]
    max_logprob_gap: f64,
    /// Maximum fraction of 2-grams in a continuation that repeat an earlier one
    #[arg(long, value_name = "FRACTION", default_value_t = DEFAULT.max_repetition, allow_negative_numbers = true)]
    max_repetition: f64,
}

impl RuleArguments {
    fn rules(&self) -> Result<Rules> {
        let rules = Rules {
            per_prompt: self.per_prompt,
            min_margin: self.min_margin,
            chosen_below: self.chosen_below,
            rejected_above: self.rejected_above,
            min_tokens: self.min_tokens,
            max_length_ratio: self.max_length_ratio,
            min_logprob: self.min_logprob,
            max_logprob_gap: self.max_logprob_gap,
            max_repetition: self.max_repetition,
        };
        rules.validate()?;
        Ok(rules)
    }
}

impl PairsCommand {
    /// Makes the pairs, writes them all at once and prints a table of the yield.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let request = MakePairsRequest {
            model: self.model.clone(),
            options: self.sampling.options()?,
            rules: self.rules.rules()?,
            prompts: self.prompts.read()?.0,
            steer_chosen: self.side("--steer-chosen", &self.sides.steer_chosen)?,
            steer_rejected: self.side("--steer-rejected", &self.sides.steer_rejected)?,
            scorers: self.rules.scorer.clone(),
            model_options: self.engine.model_options(),
            session_options: self.engine.session_options(),
        };
        // Opened first: a folder that cannot be written to should fail now, not after an hour of sampling.
        let named = print::named(self.output.as_deref());
        let mut output = Rows::open(named)?;
        let made = make_pairs::make(&request, interrupt, &mut Shown::new()).inspect_err(|error| {
            if matches!(error, Error::Interrupted) {
                print::note("no pairs were written: pairing needs all samples");
            }
        })?;
        let table = report::to_terminal(&made);
        if made.rows.is_empty() {
            print::note_lines(&table);
            let is_steered = request.steer_chosen.is_some() || request.steer_rejected.is_some();
            let hint =
                "raise -k/--samples, use other prompts, or relax the rule that dropped the most samples";
            // Seen on a small model: at 0.1 times a direction it was toxic, at 0.2 times neither toxic nor fluent.
            let coefficient = if is_steered { "; try smaller coefficients too" } else { "" };
            return Err(Error::no_result("no two samples made a pair, so nothing was written")
                .with_hint(format!("{hint}{coefficient}")));
        }
        output.write(&file::json_lines(&made.rows)?)?;
        output.finish()?;
        match named {
            Some(_) => print(&table),
            None => {
                print::note_lines(&table);
                Ok(())
            }
        }
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let mut paths = Paths::new().reads([&self.model]).reads(&self.prompts.prompts);
        for (flag, files) in
            [("--steer-chosen", &self.sides.steer_chosen), ("--steer-rejected", &self.sides.steer_rejected)]
        {
            let steering = SteeringArguments { steer: files.clone(), ..SteeringArguments::default() };
            paths = paths.reads(steering.files().map_err(|error| of_flag(flag, error))?);
        }
        Ok(print::writes_rows(paths, self.output.as_deref()))
    }

    /// Compiles the steering of one side; `None` if it is unsteered.
    fn side(&self, flag: &str, files: &[String]) -> Result<Option<SteeredSide>> {
        let arguments = SteeringArguments {
            steer: files.to_vec(),
            force: self.sides.force,
            ..SteeringArguments::default()
        };
        if arguments.is_empty() {
            return Ok(None);
        }
        let steered = arguments.compile(&self.model).map_err(|error| of_flag(flag, error))?;
        let words = steered.by.iter().map(|by| {
            let file = by["file"].as_str().unwrap_or_default();
            // As f32, so that it prints as on the command line: 0.1, not 0.10000000149.
            let coefficient = by["coefficient"].as_f64().unwrap_or(f64::NAN) as f32;
            format!("{file} x {coefficient}")
        });
        Ok(Some(SteeredSide { by: words.collect::<Vec<_>>().join(", "), steering: steered.steering }))
    }
}

/// The error about `--steer` under the name of the flag of one side.
fn of_flag(flag: &str, error: Error) -> Error {
    match error {
        Error::Setting { reason, hint, .. } => Error::Setting { setting: flag.to_owned(), reason, hint },
        other => other,
    }
}
