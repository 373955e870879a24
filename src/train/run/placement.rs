//! Chooses how a run uses a GPU's memory, before anything is allocated there.

use crate::engine::Token;
use crate::error::{Error, Result};
use crate::gguf::GgufFile;

use crate::train::data::tokens::TokenPair;
use crate::train::device::counting::Counting;
use crate::train::device::name::{DeviceName, Frozen};
use crate::train::recipe::settings::Settings;
use crate::train::recipe::step::StepOptions;
use crate::train::run::trainer::{Side, Trainer};
use crate::train::run::training_loop::EVALUATION_PAIRS;

/// Tokens per pass beyond which more tokens are not worth any other cost.
///
/// A product with a bf16 matrix does one multiplication per token for each byte of the matrix, and a GPU does 150 to
/// 300 of them in the time it reads that byte.
const ENOUGH_ROWS: usize = 512;

/// Most tokens per pass without `--ubatch-size`.
///
/// A product with a quantised matrix first rounds the whole matrix, which moves about five bytes per number. Over this
/// many tokens that costs little next to the product itself.
const MAX_ROWS: usize = 4096;

/// The options that decide how much memory a run takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// How frozen matrices are stored.
    pub frozen: Frozen,
    /// Whether the backward pass recomputes activations.
    pub checkpointing: bool,
    /// Most tokens in one pass.
    pub max_rows: usize,
}

/// The parts of a [`Choice`] that the user has fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// How frozen matrices are stored.
    pub frozen: Option<Frozen>,
    /// Whether the backward pass recomputes activations.
    pub checkpointing: Option<bool>,
    /// Most tokens in one pass; the choice may have fewer if memory is short.
    pub max_rows: Option<usize>,
}

/// The GPU memory that a run needs.
#[derive(Debug)]
pub struct Needs<'a> {
    base: &'a GgufFile,
    settings: &'a Settings,
    /// Rows of the longest pair, which is never split.
    longest: usize,
}

impl<'a> Needs<'a> {
    /// Room for libraries that load on first use and for gaps between buffers: a cautious guess.
    pub const RESERVE_BYTES: u64 = 512 << 20;

    /// The needs of a run whose longest pair has `longest` rows.
    pub fn new(base: &'a GgufFile, settings: &'a Settings, longest: usize) -> Needs<'a> {
        Needs { base, settings, longest: longest.max(1) }
    }

    /// Upper bound on the bytes that the run allocates, plus the reserve.
    ///
    /// Runs one evaluation and one step of the real trainer on a [`Counting`] device, which reads no weights. Each uses
    /// the largest pass that the run can have.
    ///
    /// # Errors
    /// As [`Trainer::load`].
    pub fn bytes(&self, choice: Choice) -> Result<u64> {
        let max_rows = choice.max_rows.max(self.longest);
        let checkpointing = choice.checkpointing;
        let options = StepOptions { checkpointing, max_rows, ..self.settings.step_options() };
        let method = self.settings.method();
        let mut trainer =
            Trainer::load(Counting::new(choice.frozen), self.base, &method, self.settings.seed, options)?;
        let evaluated = self.largest_pass(max_rows, EVALUATION_PAIRS);
        trainer.logps(Side::Policy, &evaluated.iter().collect::<Vec<_>>())?;
        let trained = self.largest_pass(max_rows, self.settings.batch_size);
        let trained: Vec<&TokenPair> = trained.iter().collect();
        let references = trainer.logps(Side::Reference, &trained)?;
        trainer.add_gradient(&trained, &references)?;
        trainer.step(self.settings.learning_rate, self.settings.max_grad_norm)?;
        Ok(trainer.device().peak_bytes() + Self::RESERVE_BYTES)
    }

    /// Pairs that need at least the memory of any pass over at most `n_pairs` pairs and `max_rows` rows.
    ///
    /// Memory depends on a pass's number of rows, pairs and outputs, not on how the rows are split among the pairs.
    /// Each number is as large as possible: with prompts of one token, all other rows belong to the answers.
    fn largest_pass(&self, max_rows: usize, n_pairs: usize) -> Vec<TokenPair> {
        let n_rows = max_rows.min(n_pairs.saturating_mul(self.longest)).max(1);
        let n_pairs = n_pairs.clamp(1, n_rows);
        let tokens = |n: usize| vec![0 as Token; n];
        let pair = |i: usize| {
            // An answer's last token has no row, so a pair's two answers have one token more than the pair has rows.
            let n_answers = n_rows / n_pairs + usize::from(i < n_rows % n_pairs) + 1;
            let n_chosen = n_answers / 2;
            TokenPair {
                index: 0,
                prompt: tokens(1),
                chosen: tokens(n_chosen),
                rejected: tokens(n_answers - n_chosen),
            }
        };
        (0..n_pairs).map(pair).collect()
    }

    /// The first choice that fits into `free` bytes, ordered by the time it costs.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] if none fits; else as [`Needs::bytes`].
    pub fn choose(&self, wanted: Wanted, device: DeviceName, free: u64) -> Result<Choice> {
        let frozen = wanted.frozen.map_or(vec![Frozen::Bf16, Frozen::Quantised], |frozen| vec![frozen]);
        let checkpointing = wanted.checkpointing.map_or(vec![false, true], |it| vec![it]);
        // No pass has more pairs than a step.
        let of_step = self.settings.batch_size.saturating_mul(self.longest).clamp(1, MAX_ROWS);
        let most = wanted.max_rows.unwrap_or(of_step.max(self.longest));
        let enough = wanted.max_rows.unwrap_or(most.min(ENOUGH_ROWS.max(self.longest)));
        let halves = |from: usize| std::iter::successors(Some(from), |n| (*n > 1).then_some(n / 2));
        let ways: Vec<(Frozen, bool)> =
            frozen.iter().flat_map(|&f| checkpointing.iter().map(move |&c| (f, c))).collect();
        // Tokens beyond `enough` are given up before anything that costs time; fewer than that only as the last resort.
        let many: Vec<usize> = halves(most).filter(|&n| n > enough).chain([enough]).collect();
        let few = halves(enough).skip(1).filter(|&n| n > self.longest).chain([self.longest.min(enough)]);
        let first = ways.iter().flat_map(|&way| many.iter().map(move |&n| (n, way)));
        let last = few.flat_map(|n| ways.iter().map(move |&way| (n, way)));
        let mut least = u64::MAX;
        for (max_rows, (frozen, checkpointing)) in first.chain(last) {
            let choice = Choice { frozen, checkpointing, max_rows };
            let bytes = self.bytes(choice)?;
            if bytes <= free {
                return Ok(choice);
            }
            least = least.min(bytes);
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let mut cures = vec!["free the card's memory (nvidia-smi lists the processes that hold it)"];
        if wanted.frozen == Some(Frozen::Bf16) {
            cures.push("--frozen quantised");
        }
        if wanted.checkpointing == Some(false) {
            cures.push("--checkpointing on");
        }
        cures.extend([
            "a smaller --rank or --max-length",
            "a smaller quantisation of the model",
            "--device cpu",
        ]);
        Err(Error::device_memory(
            device.to_string(),
            format!("this run needs about {} MiB, and {} MiB are free", mib(least), mib(free)),
        )
        .with_hint(cures.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::pack::Packed;

    const MIB: u64 = 1 << 20;

    fn base() -> GgufFile {
        GgufFile::open(concat!(env!("CARGO_MANIFEST_DIR"), "/gguf/tiny/llama.gguf")).unwrap()
    }

    #[test]
    fn less_memory_leads_to_slower_choices_until_none_fits() {
        let base = base();
        let settings = Settings { max_rows: 4096, ..Settings::paper() };
        let needs = Needs::new(&base, &settings, 1024);
        let wanted = Wanted { frozen: None, checkpointing: None, max_rows: Some(4096) };
        let choose = |wanted, free| needs.choose(wanted, DeviceName::Cuda(0), free);
        let best = Choice { frozen: Frozen::Bf16, checkpointing: false, max_rows: 4096 };
        assert_eq!(choose(wanted, 1 << 40).unwrap(), best);
        assert_eq!(choose(wanted, needs.bytes(best).unwrap()).unwrap(), best);
        let second = choose(wanted, needs.bytes(best).unwrap() - 1).unwrap();
        assert_eq!(second, Choice { checkpointing: true, ..best });
        let few = choose(wanted, needs.bytes(second).unwrap() - 1).unwrap();
        assert!(few.max_rows < 4096 && few.max_rows >= 1024, "{few:?}");

        let error = choose(wanted, 8 * MIB).unwrap_err();
        assert!(error.to_string().starts_with("cuda:0: this run needs about "), "{error}");
        assert!(error.to_string().ends_with(" MiB, and 8 MiB are free"), "{error}");
        assert!(!error.hint().unwrap().contains("--frozen"), "no option was fixed");
        let fixed = Wanted { frozen: Some(Frozen::Bf16), checkpointing: Some(false), ..wanted };
        let hint = choose(fixed, 8 * MIB).unwrap_err().hint().unwrap();
        assert!(hint.contains("--frozen quantised") && hint.contains("--checkpointing on"), "{hint}");
    }

    #[test]
    fn tokens_beyond_enough_are_given_up_first_and_the_rest_last() {
        let base = base();
        let settings = Settings { batch_size: 8, ..Settings::paper() };
        let wanted = Wanted { frozen: None, checkpointing: None, max_rows: None };
        let choose = |longest: usize, free: u64| {
            Needs::new(&base, &settings, longest).choose(wanted, DeviceName::Cuda(0), free).unwrap()
        };
        let needs = Needs::new(&base, &settings, 200);
        let best = Choice { frozen: Frozen::Bf16, checkpointing: false, max_rows: 1600 };
        assert_eq!(choose(200, 1 << 40), best, "a whole step in one pass");
        let mut choice = best;
        for expected in [
            Choice { max_rows: 800, ..best },
            Choice { max_rows: 512, ..best },
            // Recomputing the activations of 800 tokens takes less than keeping those of 512.
            Choice { max_rows: 800, checkpointing: true, ..best },
        ] {
            choice = choose(200, needs.bytes(choice).unwrap() - 1);
            assert_eq!(choice, expected);
        }
        assert_eq!(choose(3000, 1 << 40).max_rows, MAX_ROWS);
        assert_eq!(choose(5000, 1 << 40).max_rows, 5000, "a pair is never split");
    }

    #[test]
    fn more_rows_and_larger_adapters_need_more() {
        let base = base();
        let choice = Choice { frozen: Frozen::Bf16, checkpointing: false, max_rows: 512 };
        let bytes = |rank, choice| {
            let settings = Settings { rank, ..Settings::paper() };
            Needs::new(&base, &settings, 512).bytes(choice).unwrap()
        };
        assert!(bytes(64, choice) > bytes(8, choice));
        assert!(bytes(8, Choice { max_rows: 1024, ..choice }) > bytes(8, choice));
        assert!(bytes(8, Choice { checkpointing: true, ..choice }) < bytes(8, choice));
    }

    #[test]
    fn every_architecture_is_counted_and_checkpointing_saves_memory() {
        for name in ["llama", "gpt2", "bloom", "command-r", "gemma3", "qwen2", "qwen3"] {
            let path = format!("{}/gguf/tiny/{name}.gguf", env!("CARGO_MANIFEST_DIR"));
            let (base, settings) = (GgufFile::open(&path).unwrap(), Settings::paper());
            let needs = Needs::new(&base, &settings, 512);
            let bytes = |checkpointing| {
                needs.bytes(Choice { frozen: Frozen::Bf16, checkpointing, max_rows: 512 }).unwrap()
            };
            assert!(bytes(true) < bytes(false), "{name}");
        }
    }

    #[test]
    fn the_largest_pass_has_every_row_and_no_pair_beyond_the_longest() {
        let (base, settings) = (base(), Settings::paper());
        for (longest, max_rows, n_pairs, expected) in
            [(7, 20, 4, 20), (7, 100, 4, 28), (7, 7, 4, 7), (1, 3, 16, 3), (5, 5, 1, 5)]
        {
            let pairs = Needs::new(&base, &settings, longest).largest_pass(max_rows, n_pairs);
            let rows = |pair: &TokenPair| Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected);
            assert_eq!(pairs.iter().map(rows).sum::<usize>(), expected);
            assert!(pairs.len() <= n_pairs && pairs.iter().all(|pair| rows(pair) <= longest));
            assert!(pairs.iter().all(|pair| !pair.chosen.is_empty() && !pair.rejected.is_empty()));
        }
    }
}
