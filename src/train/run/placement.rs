//! Where a run is computed, and whether a GPU's memory suffices: plain arithmetic, before anything is taken there.

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorType};

use crate::train::device::name::{DeviceName, Frozen};
use crate::train::model::config::Config;
use crate::train::recipe::method::MethodName;
use crate::train::recipe::settings::Settings;

/// Bytes of logits that a GPU computes at a time: with the largest vocabularies still some hundred rows.
pub const GPU_LOGIT_BYTES: usize = 256 << 20;

/// Most bytes of a matrix in bf16 that a product makes at a time (`PART_BYTES` in `vendor/cuda/product.cu`).
const PART_BYTES: u64 = 256 << 20;

/// Workspace of cuBLASLt's products (`vendor/cuda/multiply.cu`).
const WORKSPACE_BYTES: u64 = 32 << 20;

/// Tokens in a pass beyond which more of them are worth no other cost: a product with a matrix in bf16 takes one
/// multiplication a token for each byte of it, and a GPU makes some 150 to 300 of them while it reads a byte.
const ENOUGH_ROWS: usize = 512;

/// Most tokens in a pass that are chosen without being asked for. A product with a matrix in blocks rounds all of them
/// first, which moves some five bytes a number: over this many tokens that is little beside the product.
const MOST_ROWS: usize = 4096;

/// What decides how much memory a run takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// How frozen matrices lie there.
    pub frozen: Frozen,
    /// Whether activations are made again in the backward pass.
    pub checkpointing: bool,
    /// Most tokens in one pass.
    pub max_rows: usize,
}

/// What a user has fixed of a [`Choice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// How frozen matrices lie there.
    pub frozen: Option<Frozen>,
    /// Whether activations are made again in the backward pass.
    pub checkpointing: Option<bool>,
    /// Most tokens in one pass; fewer are taken where memory does not suffice.
    pub max_rows: Option<usize>,
}

/// What a run keeps in a GPU's memory.
#[derive(Debug)]
pub struct Needs<'a> {
    base: &'a GgufFile,
    config: &'a Config,
    settings: &'a Settings,
    /// Tokens of the longest pair, which is never divided.
    longest: usize,
}

impl<'a> Needs<'a> {
    /// What libraries load once they are used, and holes between buffers: a guess, on the side of caution.
    pub const RESERVE_BYTES: u64 = 512 << 20;

    /// Of a run; `longest` are the rows of its longest pair.
    pub fn new(base: &'a GgufFile, config: &'a Config, settings: &'a Settings, longest: usize) -> Needs<'a> {
        Needs { base, config, settings, longest }
    }

    /// Bytes that the run takes, about, and rather too many.
    pub fn bytes(&self, choice: Choice) -> u64 {
        let rows = choice.max_rows.max(self.longest) as u64;
        self.weights(choice.frozen)
            + self.trained()
            + self.pass(choice.checkpointing, rows)
            + Self::RESERVE_BYTES
    }

    /// The first choice, in the order of what it costs in time, that `free` bytes suffice for.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] where none does.
    pub fn choose(&self, wanted: Wanted, device: DeviceName, free: u64) -> Result<Choice> {
        let frozen = wanted.frozen.map_or(vec![Frozen::Bf16, Frozen::Quantised], |frozen| vec![frozen]);
        let checkpointing = wanted.checkpointing.map_or(vec![false, true], |it| vec![it]);
        // No pass has more than a step's pairs.
        let of_step = self.settings.batch_size.saturating_mul(self.longest).clamp(1, MOST_ROWS);
        let most = wanted.max_rows.unwrap_or(of_step.max(self.longest));
        let enough = wanted.max_rows.unwrap_or(most.min(ENOUGH_ROWS.max(self.longest)));
        let halves = |from: usize| std::iter::successors(Some(from), |n| (*n > 1).then_some(n / 2));
        let ways: Vec<(Frozen, bool)> =
            frozen.iter().flat_map(|&f| checkpointing.iter().map(move |&c| (f, c))).collect();
        // More tokens than are enough are given up before anything that costs time, and fewer only after it.
        let many: Vec<usize> = halves(most).filter(|&n| n > enough).chain([enough]).collect();
        let few = halves(enough).skip(1).filter(|&n| n > self.longest).chain([self.longest.min(enough)]);
        let first = ways.iter().flat_map(|&way| many.iter().map(move |&n| (n, way)));
        let last = few.flat_map(|n| ways.iter().map(move |&way| (n, way)));
        let mut least = u64::MAX;
        for (max_rows, (frozen, checkpointing)) in first.chain(last) {
            let choice = Choice { frozen, checkpointing, max_rows };
            let bytes = self.bytes(choice);
            if bytes <= free {
                return Ok(choice);
            }
            least = least.min(bytes);
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let mut cures = vec!["free the card's memory (nvidia-smi names the processes that hold it)"];
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

    fn weights(&self, frozen: Frozen) -> u64 {
        if self.settings.method == MethodName::Full {
            return 0;
        }
        let has_output = self.base.tensor("output.weight").is_some();
        let mut largest = 0;
        let of = |tensor: &crate::gguf::TensorInfo| -> (u64, u64) {
            let n = tensor.n_elements();
            let blocks = tensor.tensor_type().row_bytes(n).unwrap_or(4 * n);
            if tensor.shape().len() < 2 {
                return (4 * n, 0);
            }
            let is_table = tensor.name() == "token_embd.weight";
            if tensor.name() == "position_embd.weight" {
                return (4 * n, 0);
            }
            match frozen {
                Frozen::Quantised => (blocks, 0),
                Frozen::Bf16 if is_table && has_output => (blocks, 0),
                Frozen::Bf16 if is_table => (blocks + 2 * n, 0),
                // While it is rounded, its blocks are there too.
                Frozen::Bf16 => (2 * n, blocks),
            }
        };
        let mut sum = 0;
        for tensor in self.base.tensors() {
            let (bytes, while_rounding) = of(tensor);
            sum += bytes;
            largest = largest.max(while_rounding);
        }
        sum + largest
    }

    /// Values, gradients and the optimizer's states.
    fn trained(&self) -> u64 {
        4 * self.n_trained() * (2 + self.settings.optimizer.n_states() as u64)
    }

    fn n_trained(&self) -> u64 {
        match self.settings.method() {
            crate::train::model::transformer::Method::Full => self.base.n_params(),
            crate::train::model::transformer::Method::Vector => {
                (self.config.n_layer * self.config.n_embd) as u64
            }
            crate::train::model::transformer::Method::Lora(lora) => {
                let trained = self.base.tensors().iter().filter(|tensor| lora.trains(tensor.name()));
                trained.map(|tensor| lora.rank as u64 * (tensor.shape()[0] + tensor.shape()[1])).sum()
            }
        }
    }

    /// What a forward and a backward pass of so many rows keep at once.
    fn pass(&self, checkpointing: bool, rows: u64) -> u64 {
        let config = self.config;
        let (n_embd, n_vocab) = (config.n_embd as u64, config.n_vocab as u64);
        let n_ff = config.n_ff.iter().copied().max().unwrap_or(0) as u64;
        let n_layer = config.n_layer as u64;
        let rank = if self.settings.method == MethodName::Lora { self.settings.rank as u64 } else { 0 };
        let (n_query, n_key) = (config.n_query() as u64, config.n_key() as u64);
        // Of a block: its input, both norms' outputs, the stream between, two projections before their norms; q, k, v with
        // what they were before theirs, and what attention gives; the FFN's inner numbers; and seven reduced inputs.
        let of_layer = 6 * n_embd + 3 * n_query + 3 * n_key + 3 * n_ff + 7 * rank;
        // The gradients of one block at work.
        let at_work = 6 * n_embd + 4 * n_query + 4 * n_key + 3 * n_ff + 2 * rank;
        let kept = if checkpointing { n_layer * n_embd + of_layer } else { n_layer * of_layer };
        let of_rows = 4 * rows * (kept + at_work);
        // An output a row at most, but for the two that a prompt's last row predicts.
        let outputs = 2 * rows;
        let chunk = outputs.min((GPU_LOGIT_BYTES as u64 / 4 / n_vocab.max(1)).max(1));
        let of_head = 4 * outputs * 3 * n_embd + chunk * (4 * n_vocab + 2 * n_vocab + 16 * n_embd);
        let rounded = 2 * rows * n_ff.max(n_embd).max(n_query);
        let largest_matrix = 2 * n_embd * n_vocab.max(n_ff);
        of_rows + of_head + rounded + PART_BYTES.min(largest_matrix) + WORKSPACE_BYTES
    }
}

/// Whether frozen matrices of this type can be taken to a GPU (`vendor/cuda/blocks.cuh`).
pub fn has_kernel(tensor_type: TensorType) -> bool {
    use TensorType::*;
    matches!(tensor_type, F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K | Q6_K)
}

/// Heads of a block that attention has kernels for (`vendor/cuda/ops.h`, as the next two; a test compares them, since
/// builds without a GPU do not read that file).
pub(in crate::train) const MOST_HEADS: usize = 256;

/// Numbers of a head.
pub(in crate::train) const MOST_HEAD_DIM: usize = 256;

/// Pairs of a head's numbers that can be rotated.
pub(in crate::train) const MOST_ROPE_PAIRS: usize = 256;

/// Whether a GPU has kernels for all that the model is made of; frozen matrices are those of any method but `full`.
///
/// # Errors
/// [`Error::Model`] that names what has none.
pub fn check_kernels(base: &GgufFile, config: &Config, method: MethodName) -> Result<()> {
    let refuse = |reason: String, hint: &str| Error::model(base.path(), reason).with_hint(hint);
    for (il, attention) in config.attention.iter().enumerate() {
        let (heads, dim) = (attention.n_head, attention.head_dim);
        if heads > MOST_HEADS || dim > MOST_HEAD_DIM {
            let reason = format!(
                "block {il} has {heads} heads of {dim} numbers, and the GPU has kernels for up to {MOST_HEADS} of \
                 {MOST_HEAD_DIM}"
            );
            return Err(refuse(reason, "train with --device cpu"));
        }
    }
    let pairs = config.rope.iter().flatten().map(|rope| rope.frequencies.len()).max().unwrap_or(0);
    if pairs > MOST_ROPE_PAIRS {
        let (found, most) = (2 * pairs, 2 * MOST_ROPE_PAIRS);
        let reason =
            format!("{found} numbers of a head are rotated, and the GPU has a kernel for up to {most}");
        return Err(refuse(reason, "train with --device cpu"));
    }
    if method == MethodName::Full {
        return Ok(());
    }
    // The table of positions is read as f32, whatever it is.
    let is_frozen = |tensor: &&crate::gguf::TensorInfo| {
        tensor.shape().len() > 1 && tensor.name() != "position_embd.weight"
    };
    match base.tensors().iter().filter(is_frozen).find(|tensor| !has_kernel(tensor.tensor_type())) {
        Some(tensor) => Err(refuse(
            format!("tensor {:?}: the GPU has no kernel for type {}", tensor.name(), tensor.tensor_type()),
            "quantise the model to a type that has one (such as Q4_K_M or Q8_0), or train with --device cpu",
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn base() -> GgufFile {
        GgufFile::open(concat!(env!("CARGO_MANIFEST_DIR"), "/gguf/tiny/llama.gguf")).unwrap()
    }

    #[test]
    fn less_memory_makes_choices_that_cost_more_time_until_none_is_left() {
        let base = base();
        let config = Config::read(&base, None).unwrap();
        let settings = Settings { max_rows: 4096, ..Settings::paper() };
        let needs = Needs::new(&base, &config, &settings, 100);
        let wanted = Wanted { frozen: None, checkpointing: None, max_rows: Some(4096) };
        let choose = |wanted, free| needs.choose(wanted, DeviceName::Cuda(0), free);
        let best = Choice { frozen: Frozen::Bf16, checkpointing: false, max_rows: 4096 };
        assert_eq!(choose(wanted, 1 << 40).unwrap(), best);
        assert_eq!(choose(wanted, needs.bytes(best)).unwrap(), best);
        let second = choose(wanted, needs.bytes(best) - 1).unwrap();
        assert_eq!(second, Choice { checkpointing: true, ..best });
        let few = choose(wanted, needs.bytes(second) - 1).unwrap();
        assert!(few.max_rows < 4096 && few.max_rows >= 100, "{few:?}");

        let error = choose(wanted, 8 * MIB).unwrap_err();
        assert!(error.to_string().starts_with("cuda:0: this run needs about "), "{error}");
        assert!(error.to_string().ends_with(" MiB, and 8 MiB are free"), "{error}");
        assert!(!error.hint().unwrap().contains("--frozen"), "nothing of it was fixed");
        let fixed = Wanted { frozen: Some(Frozen::Bf16), checkpointing: Some(false), ..wanted };
        let hint = choose(fixed, 8 * MIB).unwrap_err().hint().unwrap();
        assert!(hint.contains("--frozen quantised") && hint.contains("--checkpointing on"), "{hint}");
    }

    #[test]
    fn tokens_beyond_those_that_are_enough_are_given_up_first_and_the_rest_last() {
        let base = base();
        let config = Config::read(&base, None).unwrap();
        let settings = Settings { batch_size: 8, ..Settings::paper() };
        let wanted = Wanted { frozen: None, checkpointing: None, max_rows: None };
        let choose = |longest: usize, free: u64| {
            Needs::new(&base, &config, &settings, longest).choose(wanted, DeviceName::Cuda(0), free).unwrap()
        };
        let needs = Needs::new(&base, &config, &settings, 200);
        let best = Choice { frozen: Frozen::Bf16, checkpointing: false, max_rows: 1600 };
        assert_eq!(choose(200, 1 << 40), best, "a whole step in one pass");
        let mut choice = best;
        for expected in [
            Choice { max_rows: 800, ..best },
            Choice { max_rows: 512, ..best },
            Choice { max_rows: 512, checkpointing: true, ..best },
        ] {
            choice = choose(200, needs.bytes(choice) - 1);
            assert_eq!(choice, expected);
        }
        assert_eq!(choose(3000, 1 << 40).max_rows, MOST_ROWS);
        assert_eq!(choose(5000, 1 << 40).max_rows, 5000, "a pair is never divided");
    }

    #[test]
    fn rejects_models_of_which_a_gpu_has_no_kernel_for_a_part() {
        let base = base();
        let config = Config::read(&base, None).unwrap();
        check_kernels(&base, &config, MethodName::Lora).unwrap();
        let refused = |config: &Config| {
            let error = check_kernels(&base, config, MethodName::Lora).unwrap_err();
            assert!(error.hint().unwrap().contains("--device cpu"), "{error:?}");
            error.to_string()
        };
        let mut large = config.clone();
        large.attention[1].head_dim = 512;
        let said = refused(&large);
        assert!(
            said.contains("block 1 has ") && said.contains(" of 512 numbers, and the GPU has kernels"),
            "{said}"
        );
        let mut many = config.clone();
        many.attention[0].n_head = 257;
        assert!(refused(&many).contains("block 0 has 257 heads"));
        let mut rotated = config;
        rotated.rope[0].as_mut().unwrap().frequencies = vec![1.0; 257];
        assert!(refused(&rotated).contains("514 numbers of a head are rotated"));
    }

    #[test]
    fn more_rows_and_larger_adapters_need_more() {
        let base = base();
        let config = Config::read(&base, None).unwrap();
        let choice = Choice { frozen: Frozen::Bf16, checkpointing: false, max_rows: 512 };
        let bytes = |rank, choice| {
            let settings = Settings { rank, ..Settings::paper() };
            Needs::new(&base, &config, &settings, 1).bytes(choice)
        };
        assert!(bytes(64, choice) > bytes(8, choice));
        assert!(bytes(8, Choice { max_rows: 1024, ..choice }) > bytes(8, choice));
        assert!(bytes(8, Choice { checkpointing: true, ..choice }) < bytes(8, choice));
    }
}
