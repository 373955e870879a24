//! Prints the logits after the last of the given tokens as JSON, steered or not.
//!
//! `scripts/check_stock.py` uses it to compare this program with others.
//!
//! ```sh
//! cargo run --release --example logits -- MODEL 1,60,70,80 [STEER_FILE COEFFICIENT | --lora ADAPTER]
//! ```

use std::path::Path;

use detox_gguf::engine::steering::LoraScaled;
use detox_gguf::engine::{
    CacheType, FlashAttention, Model, ModelOptions, Session, SessionOptions, Steering, Token,
};
use detox_gguf::gguf::GgufFile;
use detox_gguf::steer::SteerFile;
use detox_gguf::steer::compile::{CompileOptions, compile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut lora = None;
    let (model, tokens, steer) = match arguments.as_slice() {
        [model, tokens] => (model, tokens, None),
        [model, tokens, flag, file] if flag == "--lora" => {
            lora = Some(LoraScaled { path: file.into(), scale: 1.0 });
            (model, tokens, None)
        }
        [model, tokens, file, coefficient] => (model, tokens, Some((file, coefficient.parse::<f32>()?))),
        _ => return Err("expected MODEL TOKEN,TOKEN,… [STEER_FILE COEFFICIENT | --lora ADAPTER]".into()),
    };
    let tokens = tokens.split(',').map(str::parse).collect::<Result<Vec<Token>, _>>()?;
    let path = Path::new(model);
    let mut model = Model::open(path, &ModelOptions::default())?;
    if let Some((file, coefficient)) = steer {
        let sources = [(SteerFile::open(Path::new(file))?, coefficient)];
        let compiled = compile(&GgufFile::open(path)?, &sources, &[], &CompileOptions::default())?;
        model = model.with_steering(compiled.steering)?;
    }
    if let Some(lora) = lora {
        detox_gguf::steer::lora::check(&lora, &GgufFile::open(path)?)?;
        model = model.with_steering(Steering { loras: vec![lora], ..Steering::default() })?;
    }
    let options = SessionOptions {
        n_parallel: Some(1),
        flash_attention: FlashAttention::Off,
        cache_type_k: CacheType::F32,
        cache_type_v: CacheType::F32,
        ..SessionOptions::default()
    };
    let logits = Session::open(&model, &options, tokens.len())?.logits(&tokens)?;
    println!("{}", serde_json::to_string(logits.last().ok_or("no tokens")?)?);
    Ok(())
}
