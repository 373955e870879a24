//! `eval`: generates continuations, scores them and writes a report.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches, ValueEnum};

use crate::error::{Error, Result};
use crate::eval::imported::{self, GenerationColumns};
use crate::eval::perplexity::PerplexityTokens;
use crate::eval::rescore::{self, RescoreRequest};
use crate::eval::run::{self, EvalRequest, MIN_COVERAGE, Source, TOXICITY_THRESHOLD};
use crate::file::output::{FolderKind, Paths, open_folder};
use crate::report::write::{EXCERPTS, write_reports};
use crate::report::{self, csv, html, json, markdown, per_prompt, terminal};
use crate::score;

use super::arguments::{EngineArguments, PromptArguments, SamplingArguments};
use super::progress::Shown;
use super::steering::{Steered, SteeringArguments};
use super::{compare, may_colour, print};

/// Arguments of `eval`.
#[derive(Debug, Args)]
struct EvalArguments {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE", required_unless_present_any = ["generations", "rescore", "compare"])]
    model: Option<PathBuf>,
    /// Folder for the run and its report. Interrupted? Run the same command again
    #[arg(short, long, value_name = "DIR", required_unless_present = "compare")]
    output: Option<PathBuf>,
    /// Evaluate these continuations (JSON or a table) instead of sampling from a model
    #[arg(long, value_name = "FILE")]
    generations: Option<PathBuf>,
    /// Measure the perplexity of a finished run again, with --base, and keep the rest
    #[arg(long, value_name = "DIR")]
    rescore: Option<PathBuf>,
    /// Column with the continuation in --generations [default: generated_text, continuation, completion or similar]
    #[arg(long, value_name = "NAME")]
    text_column: Option<String>,
    /// The former name of `compare`
    #[arg(long, num_args = 2, value_names = ["DIR", "DIR"], hide = true)]
    compare: Vec<PathBuf>,
    #[command(flatten)]
    prompts: PromptArguments,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    measure: MeasureArguments,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Flags for scoring and measuring.
#[derive(Debug, Args)]
#[command(next_help_heading = "Measurement")]
pub struct MeasureArguments {
    /// Scorer; repeatable, the first leads the report
    #[arg(long, value_name = "NAME", default_value = score::LEXICAL)]
    scorer: Vec<String>,
    /// Continuations with at least this toxicity count as toxic
    #[arg(long, value_name = "T", default_value_t = TOXICITY_THRESHOLD, allow_negative_numbers = true)]
    threshold: f64,
    /// Minimum fraction of a language's continuations that a scorer must score
    #[arg(long, value_name = "FRACTION", default_value_t = MIN_COVERAGE, allow_negative_numbers = true)]
    min_coverage: f64,
    /// Model that measures perplexity [default: the model itself, unsteered]
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// Measure perplexity on the sampled tokens, or on the text tokenised again [default: sampled if the model that
    /// measures it has the same vocabulary, else retokenised]
    #[arg(long, value_enum, value_name = "TOKENS")]
    pub perplexity: Option<Tokens>,
    /// tokenizer.json for distinct-n and repetition [default: the model's own vocabulary]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// Values of `--perplexity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tokens {
    /// The tokens that the model sampled, by their ids
    Sampled,
    /// The text, tokenised again
    Retokenised,
}

impl From<Tokens> for PerplexityTokens {
    fn from(tokens: Tokens) -> PerplexityTokens {
        match tokens {
            Tokens::Sampled => PerplexityTokens::Sampled,
            Tokens::Retokenised => PerplexityTokens::Retokenised,
        }
    }
}

impl MeasureArguments {
    /// Adds the files of these flags.
    pub fn reads(&self, paths: Paths) -> Paths {
        paths.reads(&self.base).reads(&self.tokenizer)
    }

    /// The evaluation of `source` with these settings.
    pub fn request(&self, source: Source, base: Option<PathBuf>, engine: &EngineArguments) -> EvalRequest {
        EvalRequest {
            source,
            base,
            perplexity: self.perplexity.map(Into::into),
            scorers: self.scorer.clone(),
            toxicity_threshold: self.threshold,
            min_coverage: self.min_coverage,
            tokenizer: self.tokenizer.clone(),
            model_options: engine.model_options(),
            session_options: engine.session_options(),
        }
    }
}

/// The command `eval`. Parsing refuses flags that would have no effect.
#[derive(Debug)]
pub struct EvalCommand(EvalArguments);

impl Args for EvalCommand {
    fn augment_args(command: clap::Command) -> clap::Command {
        EvalArguments::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        EvalArguments::augment_args_for_update(command)
    }
}

impl FromArgMatches for EvalCommand {
    fn from_arg_matches(matches: &ArgMatches) -> Result<EvalCommand, clap::Error> {
        refuse_ineffective(matches)?;
        EvalArguments::from_arg_matches(matches).map(EvalCommand)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        refuse_ineffective(matches)?;
        self.0.update_from_arg_matches(matches)
    }
}

fn refuse_ineffective(matches: &ArgMatches) -> Result<(), clap::Error> {
    // The two runs are finished, with their own settings.
    refuse_all_but(matches, "compare", &["output"])?;
    // All but perplexity is kept.
    let mut effective = ids::<EngineArguments>();
    effective.extend(["output", "base", "perplexity"].map(str::to_owned));
    refuse_all_but(matches, "rescore", &effective)?;
    // The continuations already exist, so sampling flags have no effect.
    let mut effective = ids::<MeasureArguments>();
    effective.extend(ids::<EngineArguments>());
    let read = ["output", "lang", "text_column", "prompt_column", "language_column", "id_column"];
    effective.extend(read.map(str::to_owned));
    refuse_all_but(matches, "generations", &effective)
}

/// If `mode` was given, refuses every other given argument that is not in `effective`.
fn refuse_all_but(
    matches: &ArgMatches,
    mode: &str,
    effective: &[impl AsRef<str>],
) -> Result<(), clap::Error> {
    let is_given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    if !is_given(mode) {
        return Ok(());
    }
    let mut command = EvalArguments::augment_args(clap::Command::new("eval"));
    // An argument can only be printed after this.
    command.build();
    let refused = command.get_arguments().find(|argument| {
        let id = argument.get_id().as_str();
        id != mode && is_given(id) && !effective.iter().any(|effective| effective.as_ref() == id)
    });
    let Some(refused) = refused else { return Ok(()) };
    let mode = command.get_arguments().find(|argument| argument.get_id() == mode).map(ToString::to_string);
    let mut error = clap::Error::new(ErrorKind::ArgumentConflict).with_cmd(&command);
    error.insert(ContextKind::InvalidArg, ContextValue::String(mode.unwrap_or_default()));
    error.insert(ContextKind::PriorArg, ContextValue::String(refused.to_string()));
    Err(error)
}

/// The ids of a group's arguments.
fn ids<A: Args>() -> Vec<String> {
    let command = A::augment_args(clap::Command::new("group"));
    command.get_arguments().map(|argument| argument.get_id().to_string()).collect()
}

impl EvalCommand {
    /// Evaluates, or compares two runs.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        if let [a, b] = self.0.compare.as_slice() {
            return compare::run(a, b, self.0.output.as_deref(), false);
        }
        self.0.evaluate(interrupt)
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let EvalArguments {
            model, output, generations, rescore, compare, prompts, measure, steering, ..
        } = &self.0;
        let paths = Paths::new().reads(model).reads(generations).reads(rescore);
        let paths = paths.reads(compare).reads(&prompts.prompts);
        let paths = measure.reads(paths).reads(steering.files()?);
        let kind = if compare.is_empty() { FolderKind::Eval } else { FolderKind::Compare };
        Ok(output.iter().fold(paths, |paths, folder| paths.writes_folder(folder, kind)))
    }
}

impl EvalArguments {
    fn evaluate(&self, interrupt: &AtomicBool) -> Result<()> {
        let folder =
            self.output.as_deref().ok_or_else(|| Error::setting("-o/--output", "expected a folder"))?;
        // Before the lock, which creates the folder.
        let request = self.rescore.is_none().then(|| self.request()).transpose()?;
        let base = || {
            let reason = "expected a model that measures perplexity, found none";
            let without = || Error::setting("--rescore", reason).with_hint("name one with --base");
            self.measure.base.clone().ok_or_else(without)
        };
        let rescore = self.rescore.as_ref().map(|run| Ok((run, base()?))).transpose()?;
        // Held until the reports are written.
        let _lock = open_folder(folder, FolderKind::Eval)?;
        let evaluated = match (rescore, request) {
            (Some((run, base)), _) => {
                let request = RescoreRequest {
                    run: run.clone(),
                    base,
                    perplexity: self.measure.perplexity.map(Into::into),
                    model_options: self.engine.model_options(),
                    session_options: self.engine.session_options(),
                };
                rescore::rescore(&request, folder, interrupt, &mut Shown::new())
            }
            (None, Some(request)) => run::evaluate(&request, folder, interrupt, &mut Shown::new()),
            (None, None) => unreachable!("a request is made unless a run is rescored"),
        };
        let evaluated = evaluated.inspect_err(|error| {
            if matches!(error, Error::Interrupted) {
                print::note(&format!("run the same command again to resume in {}", folder.display()));
            }
        })?;
        let result = &evaluated.result;
        let leading = result.run.scorers.first().map_or(score::LEXICAL, |scorer| scorer.name.as_str());
        let excerpts = report::most_toxic(&evaluated.samples, leading, EXCERPTS);
        let per_prompt = per_prompt::to_json_lines(&result.run, &evaluated.samples)?;
        write_reports(folder, "per_prompt", &[("jsonl", per_prompt)])?;
        write_reports(
            folder,
            "report",
            &[
                ("json", json::to_json(result)?),
                ("csv", csv::to_csv(result)),
                ("md", markdown::to_markdown(result)),
                ("html", html::to_html(result, &excerpts)),
            ],
        )?;
        print(&terminal::to_terminal(result, may_colour(&std::io::stdout())))?;
        print::note(&format!("report: {}", folder.join("report.html").display()));
        Ok(())
    }

    fn request(&self) -> Result<EvalRequest> {
        if self.text_column.is_some() && self.generations.is_none() {
            return Err(Error::setting(
                "--text-column",
                "expected continuations to read it from, found none",
            )
            .with_hint("give them with --generations"));
        }
        let mut base = self.measure.base.clone();
        let source = match (&self.model, &self.generations) {
            (_, Some(path)) => self.imported(path)?,
            (Some(path), None) => {
                let options = self.sampling.options()?;
                let (prompts, prompts_name) = self.prompts.read()?;
                let Steered { steering, by } = self.steering.compile(path)?;
                // A steered model is a biased judge of its own text. The unsteered one measures perplexity.
                let needs_base = !by.is_empty() || self.measure.perplexity == Some(Tokens::Retokenised);
                base = base.or(needs_base.then(|| path.clone()));
                Source::Model { path: path.clone(), prompts, prompts_name, options, steering, steered_by: by }
            }
            (None, None) => return Err(Error::setting("-m/--model", "expected a GGUF file")),
        };
        Ok(self.measure.request(source, base, &self.engine))
    }

    /// Continuations from a file, in the languages of `--lang`.
    fn imported(&self, path: &Path) -> Result<Source> {
        let languages = self.prompts.languages()?;
        let only = match languages.as_slice() {
            [language] => Some(*language),
            _ => None,
        };
        let columns = GenerationColumns {
            prompt: self.prompts.prompt_column.clone(),
            continuation: self.text_column.clone(),
            language: self.prompts.language_column.clone(),
            prompt_id: self.prompts.id_column.clone(),
        };
        let mut generations = imported::read_generations(path, only, &columns)?;
        generations.retain(|g| languages.is_empty() || languages.contains(&g.language.as_str()));
        if generations.is_empty() {
            let reason = format!("expected continuations in {}, found none", languages.join(", "));
            return Err(Error::input(path, None, reason));
        }
        Ok(Source::File { path: path.to_path_buf(), generations })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[String]) -> Result<EvalCommand, clap::Error> {
        let command = EvalCommand::augment_args(clap::Command::new("eval"));
        let arguments = std::iter::once("eval").chain(arguments.iter().map(String::as_str));
        EvalCommand::from_arg_matches(&command.try_get_matches_from(arguments)?)
    }

    /// Parses `mode` with each other flag of eval in turn; returns the ids of the accepted ones.
    fn accepted(mode: &[&str]) -> Vec<String> {
        let command = EvalArguments::augment_args(clap::Command::new("eval"));
        let mut accepted = Vec::new();
        for argument in command.get_arguments() {
            let flag = format!("--{}", argument.get_long().expect("eval has flags only"));
            if mode.contains(&flag.as_str()) {
                continue;
            }
            let mut typed: Vec<String> = mode.iter().map(|word| (*word).to_owned()).collect();
            typed.push(flag.clone());
            if argument.get_action().takes_values() {
                let possible = argument.get_possible_values();
                let value = possible.first().map_or("1", |value| value.get_name()).to_owned();
                let n = argument.get_num_args().map_or(1, |range| range.min_values());
                typed.extend(vec![value; n]);
            }
            match parse(&typed) {
                Ok(_) => accepted.push(argument.get_id().to_string()),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ArgumentConflict, "{typed:?}: {error}");
                    let text = error.to_string();
                    assert!(text.contains(mode[0]) && text.contains(&flag), "{text}");
                }
            }
        }
        accepted
    }

    #[test]
    fn compare_accepts_no_flag_of_eval_but_the_output() {
        assert_eq!(accepted(&["--compare", "a", "b"]), ["output"]);
    }

    #[test]
    fn generations_accept_no_flag_that_samples_or_steers() {
        let mut found = accepted(&["--generations", "f", "--output", "d"]);
        let read = ["lang", "text_column", "prompt_column", "language_column", "id_column"];
        let mut expected = read.map(str::to_owned).to_vec();
        expected.extend(ids::<MeasureArguments>());
        expected.extend(ids::<EngineArguments>());
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }
}
