//! Names of devices, and of how a device stores and rounds weights.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The device that computes a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DeviceName {
    /// The CPU.
    #[default]
    Cpu,
    /// The NVIDIA GPU with this number, from 0.
    Cuda(usize),
}

impl DeviceName {
    /// Whether it is the CPU.
    pub fn is_cpu(&self) -> bool {
        *self == DeviceName::Cpu
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceName, String> {
        let refuse = || format!("expected cpu, cuda or cuda:N, found {text:?}");
        match text.split_once(':') {
            None if text == "cpu" => Ok(DeviceName::Cpu),
            None if text == "cuda" => Ok(DeviceName::Cuda(0)),
            Some(("cuda", n)) => n.parse().map(DeviceName::Cuda).map_err(|_| refuse()),
            _ => Err(refuse()),
        }
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> String {
        name.to_string()
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> Result<DeviceName, String> {
        text.parse()
    }
}

/// How a GPU stores frozen matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Frozen {
    /// Rounded to bf16, two bytes per number: ready for products.
    Bf16,
    /// As the file's blocks. Each product first rounds them to bf16, a part at a time.
    Quantised,
}

impl Frozen {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Frozen::Bf16 => "bf16",
            Frozen::Quantised => "quantised",
        }
    }

    /// The storage in words, for messages.
    pub fn place(self) -> &'static str {
        match self {
            Frozen::Bf16 => "bf16",
            Frozen::Quantised => "the file's blocks",
        }
    }
}

/// What the trainer rounds before a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Nothing: products are f32.
    Nothing,
    /// Operands of products with quantised matrices, to 8 bits.
    Bytes,
    /// Operands of all products, to bf16.
    Bf16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_parse_and_print_alike() {
        for (text, name) in
            [("cpu", DeviceName::Cpu), ("cuda", DeviceName::Cuda(0)), ("cuda:3", DeviceName::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        assert_eq!(serde_json::to_string(&DeviceName::Cuda(1)).unwrap(), "\"cuda:1\"");
        for text in ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", ""] {
            assert!(
                text.parse::<DeviceName>().unwrap_err().contains("expected cpu, cuda or cuda:N"),
                "{text}"
            );
        }
    }
}
