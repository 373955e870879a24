//! A loaded model: its sizes, its tokenizer, and its steering.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::gguf::{self, GgufFile, ModelFiles, WatchedFile};
use crate::graph::Architecture;
use crate::graph::steering::{Change, Operation, Steering};

use super::Token;
use super::ffi::{self, LoadParams, LoraHandle, ModelHandle};
use super::options::ModelOptions;
use super::vocabulary::Vocabulary;

/// A model in memory, for any number of sessions.
#[derive(Debug, Clone)]
pub struct Model {
    pub(super) handle: Arc<ModelHandle>,
    vocabulary: Vocabulary,
    architecture: String,
    n_layer: usize,
    /// Number of neurons of each layer, `[n_layer]`.
    n_ff: Vec<usize>,
    /// Rows of the table of learned positions, if there is one.
    n_positions: Option<usize>,
    kv_bytes_per_cell: usize,
    on_cpu: bool,
    /// Whether sequences may share batches, once that is known.
    pub(super) shares_batches: Arc<OnceLock<bool>>,
    files: ModelFiles,
    steering: Arc<LoadedSteering>,
}

/// A [`Steering`] checked against a model, with its adapters in memory.
#[derive(Debug)]
pub struct LoadedSteering {
    steering: Steering,
    pub(super) loras: Vec<(Arc<LoraHandle>, f32)>,
    pub(super) model: Arc<ModelHandle>,
}

impl LoadedSteering {
    /// The steering as it was described.
    pub fn steering(&self) -> &Steering {
        &self.steering
    }
}

impl Model {
    /// Loads the GGUF at `path`.
    ///
    /// Our own reader validates the file first, because llama.cpp may abort the process on a malformed file.
    ///
    /// Errors: [`Error::Io`]; [`Error::Gguf`]; [`Error::Model`] for a well-formed file that is not a text-generation
    /// model, or whose architecture llama.cpp does not support.
    pub fn open(path: &Path, options: &ModelOptions) -> Result<Model> {
        let file = GgufFile::open(path)?;
        gguf::check_decoder(&file)?;
        let architecture = file.architecture()?.to_owned();
        let refused = |reason: String, hint: &str| Error::model(path, reason).with_hint(hint);
        let n_layer = file.n_layer()? as usize;
        let n_ff = file.n_ff_per_layer().unwrap_or_default().into_iter().map(|n| n as usize).collect();
        let params = LoadParams {
            n_gpu_layers: options.n_gpu_layers,
            check_tensors: options.check_tensors,
            vocab_only: false,
        };
        file.check_unchanged()?;
        let handle = ModelHandle::load(&file, params);
        // llama.cpp opened the path again: this proves that it found the same bytes.
        file.check_unchanged()?;
        let handle = handle.map_err(|mut reason| {
            let version = super::llama_version();
            if reason.contains("wrong number of tensors")
                && let Some(name) = gguf::unexpected_tensor(&file)
            {
                reason.push_str(&format!("; tensor {name:?} does not belong to {architecture}"));
            }
            refused(
                format!(
                    "llama.cpp {version} refused it (architecture {architecture:?}){}",
                    ffi::after_colon(&reason)
                ),
                "run again with -v to see llama.cpp's log",
            )
        })?;
        if !handle.is_decoder_only() {
            return Err(refused(
                format!("architecture {architecture:?} does not generate text token by token"),
                "use a decoder-only model, such as one of the llama, gemma or qwen families",
            ));
        }
        let kv_bytes_per_cell = kv_bytes_per_cell(&file);
        let on_cpu = options.n_gpu_layers == 0 || !ffi::supports_offload();
        let handle = Arc::new(handle);
        let steering =
            LoadedSteering { steering: Steering::default(), loras: Vec::new(), model: handle.clone() };
        Ok(Model {
            vocabulary: Vocabulary::new(handle.clone(), &file).with_nfc(options.nfc),
            handle,
            architecture,
            n_layer,
            n_ff,
            n_positions: n_positions(&file),
            kv_bytes_per_cell,
            on_cpu,
            shares_batches: Arc::default(),
            files: file.files(),
            steering: Arc::new(steering),
        })
    }

    /// Checks a steering against this model, and loads its adapters.
    ///
    /// Errors: [`Error::Model`] for edits on an unsupported architecture, for layers or neurons out of range, for
    /// vectors of the wrong length, and if llama.cpp refuses an adapter.
    pub fn load_steering(&self, steering: Steering) -> Result<LoadedSteering> {
        self.check_steering(&steering)?;
        let loras = steering
            .loras
            .iter()
            .map(|lora| {
                let file = WatchedFile::open(&lora.path)?;
                let handle = LoraHandle::load(&self.handle, &lora.path);
                file.check_path()?;
                let handle = handle.map_err(|reason| {
                    let base = self.path().display();
                    Error::model(
                        &lora.path,
                        format!(
                            "llama.cpp refused it as a LoRA adapter of {base}{}",
                            ffi::after_colon(&reason)
                        ),
                    )
                    .with_hint("run again with -v to see llama.cpp's log")
                })?;
                Ok((Arc::new(handle), lora.scale))
            })
            .collect::<Result<_>>()?;
        Ok(LoadedSteering { steering, loras, model: self.handle.clone() })
    }

    /// The same model, with a steering for every session opened over it.
    ///
    /// Errors: as [`Model::load_steering`].
    pub fn with_steering(&self, steering: Steering) -> Result<Model> {
        let steering = Arc::new(self.load_steering(steering)?);
        Ok(Model { steering, ..self.clone() })
    }

    /// The same model without steering.
    pub(super) fn without_steering(self) -> Model {
        let steering =
            LoadedSteering { steering: Steering::default(), loras: Vec::new(), model: self.handle.clone() };
        Model { steering: Arc::new(steering), ..self }
    }

    /// Its steering, which may be empty.
    pub fn steering(&self) -> &Arc<LoadedSteering> {
        &self.steering
    }

    /// The entry for its architecture in the table of known graphs.
    ///
    /// Errors: [`Error::Model`] for an architecture that interventions and recordings do not support.
    pub fn graph(&self) -> Result<&'static Architecture> {
        Architecture::require(&self.architecture, self.path())
    }

    fn check_steering(&self, steering: &Steering) -> Result<()> {
        let refuse = |reason: String| Error::model(self.path(), reason);
        if let Some(vector) = &steering.control_vector {
            let (n_embd, n_values) = (self.n_embd(), self.n_embd() * self.n_layer.saturating_sub(1));
            if vector.n_embd != n_embd || vector.rows.len() != n_values {
                return Err(refuse(format!(
                    "expected a control vector of {} rows of {n_embd} values, found {} values in rows of {}",
                    self.n_layer.saturating_sub(1),
                    vector.rows.len(),
                    vector.n_embd
                )));
            }
            if vector.rows.iter().any(|v| !v.is_finite()) {
                return Err(refuse("a control vector contains NaN or infinity".into()));
            }
        }
        if let Some(lora) = steering.loras.iter().find(|lora| !lora.scale.is_finite()) {
            return Err(refuse(format!(
                "expected a finite scale for adapter {}, found {}",
                lora.path.display(),
                lora.scale
            )));
        }
        if !steering.edits.is_empty() {
            self.graph()?;
        }
        for edit in &steering.edits {
            if edit.layer >= self.n_layer {
                let n_layer = self.n_layer;
                return Err(refuse(format!(
                    "expected edits of layers 0 to {1}, found one of layer {0}",
                    edit.layer,
                    n_layer - 1
                )));
            }
            let operation = match &edit.change {
                Change::Neuron { index, operation } => {
                    let n_ff = self.n_ff.get(edit.layer).copied().unwrap_or(0);
                    if *index >= n_ff {
                        return Err(refuse(format!(
                            "expected edits of neurons below {n_ff} in layer {}, found one of neuron {index}",
                            edit.layer
                        )));
                    }
                    operation
                }
                Change::Direction { vector, operation } => {
                    if vector.len() != self.n_embd() {
                        return Err(refuse(format!(
                            "expected a direction of {} values, found {}",
                            self.n_embd(),
                            vector.len()
                        )));
                    }
                    if vector.iter().any(|v| !v.is_finite()) || vector.iter().all(|&v| v == 0.0) {
                        return Err(refuse("a direction is zero, or contains NaN or infinity".into()));
                    }
                    operation
                }
            };
            let is_sound = edit.coefficient.is_finite()
                && match *operation {
                    Operation::Offset(x) | Operation::Assign(x) | Operation::Scale(x) => x.is_finite(),
                    // One bound may be infinite.
                    Operation::Clamp { min, max } => min <= max,
                };
            if !is_sound {
                return Err(refuse(format!(
                    "expected finite numbers in an edit of layer {}, found {operation:?} with coefficient {}",
                    edit.layer, edit.coefficient
                )));
            }
        }
        Ok(())
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        self.vocabulary.path()
    }

    /// Its open files, to hash what runs.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// `general.architecture` of the GGUF.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// llama.cpp's one-line description: architecture, parameters, quantisation.
    pub fn description(&self) -> String {
        self.handle.description()
    }

    /// Size of the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.vocabulary.n_vocab()
    }

    /// Number of layers (blocks).
    pub fn n_layer(&self) -> usize {
        self.n_layer
    }

    /// Width of the residual stream.
    pub fn n_embd(&self) -> usize {
        self.handle.n_embd()
    }

    /// Number of neurons in each layer's FFN, `[n_layer]`; empty if the file does not give it.
    pub fn n_ff(&self) -> &[usize] {
        &self.n_ff
    }

    /// Context length that the model was trained with, in tokens.
    pub fn n_ctx_train(&self) -> usize {
        self.handle.n_ctx_train()
    }

    /// The most tokens of a text, if the model looks positions up in a learned table. Beyond it, ggml would abort.
    pub fn n_positions(&self) -> Option<usize> {
        self.n_positions
    }

    /// Number of weights.
    pub fn n_params(&self) -> u64 {
        self.handle.n_params()
    }

    /// Bytes of F16 KV cache per token, over all layers.
    pub fn kv_bytes_per_cell(&self) -> usize {
        self.kv_bytes_per_cell
    }

    /// Whether every layer runs on the CPU.
    pub fn on_cpu(&self) -> bool {
        self.on_cpu
    }

    /// Its tokenizer and tokens.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// See [`Vocabulary::tokenize_prompt`].
    pub fn tokenize_prompt(&self, text: &str) -> Result<Vec<Token>> {
        self.vocabulary.tokenize_prompt(text)
    }

    /// See [`Vocabulary::tokenize_text`].
    pub fn tokenize_text(&self, text: &str) -> Result<Vec<Token>> {
        self.vocabulary.tokenize_text(text)
    }

    /// See [`Vocabulary::piece`].
    pub fn piece(&self, token: Token) -> Vec<u8> {
        self.vocabulary.piece(token)
    }

    /// See [`Vocabulary::detokenize`].
    pub fn detokenize(&self, tokens: &[Token]) -> String {
        self.vocabulary.detokenize(tokens)
    }

    /// Whether `token` is a control token, which has no text.
    pub fn is_control(&self, token: Token) -> bool {
        self.handle.is_control(token)
    }

    /// Whether `token` ends a generation.
    pub fn is_end_of_generation(&self, token: Token) -> bool {
        self.handle.is_end_of_generation(token)
    }
}

/// Rows of the table of learned positions.
fn n_positions(file: &GgufFile) -> Option<usize> {
    let n_rows = *file.tensor("position_embd.weight")?.shape().get(1)?;
    usize::try_from(n_rows).ok()
}

/// Layers times heads times (key + value) width times two bytes, from the metadata.
fn kv_bytes_per_cell(file: &GgufFile) -> usize {
    let n_layer = file.n_layer().unwrap_or(1) as usize;
    let n_embd = file.n_embd().unwrap_or(1) as usize;
    let n_head = file.n_head().unwrap_or(1).max(1) as usize;
    let n_head_kv = file.n_head_kv().unwrap_or(n_head as u32).max(1) as usize;
    let of_head = |name: &str| {
        let value = file.arch_key(name).ok().and_then(|key| file.u32_if_present(&key).ok()?);
        value.map_or(n_embd / n_head, |n| n as usize)
    };
    n_layer * n_head_kv * (of_head("attention.key_length") + of_head("attention.value_length")) * 2
}
