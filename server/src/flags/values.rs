//! The types of flags' values, and what they mean to the engine.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use tidemill_engine::handle::{DigestCoverage, Fault, FaultStage, HandoffMode, Role, TransportChoice};
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};

/// A number of bytes, typed as `2GiB`, `512M` or `1000000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteSize(pub(crate) u64);

/// Core numbers, typed as `0-3,6`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CoreList(pub(crate) Vec<usize>);

/// See [`Role`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleName {
    /// Computes prompts
    Prefill,
    /// Computes answers
    Decode,
    /// Both
    Hybrid,
}

/// See [`KvDtype`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvCacheDtype {
    /// The type of the weights
    #[default]
    Auto,
    /// Single precision
    F32,
    /// Half precision
    F16,
    /// bfloat16
    Bf16,
    /// 8 bit with a scale per token and head: half the memory, slightly other answers
    Int8,
    /// 8 bit floating point (E4M3) with a scale per token and head; also written fp8_e4m3
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

/// See [`AxisOrder`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum AxisOrderName {
    /// Also written NHD
    #[default]
    TokenHead,
    /// Also written HND
    HeadToken,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadFormatName {
    /// The model's files, be they safetensors or GGUF; also written auto or gguf
    #[default]
    #[value(aliases = ["auto", "gguf"])]
    Safetensors,
    /// Random weights in the shape of the model's config, to measure speed without a download
    Dummy,
}

/// See [`TransportChoice`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportName {
    /// Shared memory between processes of one host, otherwise RDMA where both have a device, otherwise TCP
    #[default]
    Auto,
    /// Shared memory only
    Shm,
    /// RDMA, on one host too
    Rdma,
    /// TCP only
    Tcp,
}

/// See [`HandoffMode`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum HandoffName {
    /// The prefill worker writes into the decode worker's memory
    #[default]
    Push,
    /// The decode worker reads from the prefill worker; nobody may write into its memory, which excludes shared memory
    Pull,
}

/// See [`DigestCoverage`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DigestName {
    /// Some cache lines of each layer of each block
    #[default]
    Sampled,
    /// Every byte
    Full,
}

/// See [`Fault`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FaultPoint(pub(crate) Fault);

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    #[default]
    Text,
    /// For machines
    Json,
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1_u64,
            "k" | "ki" | "kib" => 1 << 10,
            "m" | "mi" | "mib" => 1 << 20,
            "g" | "gi" | "gib" => 1 << 30,
            "t" | "ti" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(format!("`{unit}` is not a unit of size: try 512MiB or 2GiB")),
        };
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(factor),
            Err(_) => match number.parse::<f64>() {
                // Fractions are for people; a rounded byte does no harm.
                Ok(fraction) => Some((fraction * factor as f64) as u64),
                Err(_) => return Err(format!("`{text}` is not a size: try 512MiB or 2GiB")),
            },
        };
        match bytes {
            Some(bytes) if 0 < bytes => Ok(Self(bytes)),
            _ => Err(format!("`{text}` is out of range")),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes != 0 && bytes % (1 << 30) == 0 => write!(f, "{}GiB", bytes >> 30),
            bytes if bytes != 0 && bytes % (1 << 20) == 0 => write!(f, "{}MiB", bytes >> 20),
            bytes => write!(f, "{bytes}"),
        }
    }
}

impl FromStr for CoreList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            let core: usize = part.trim().parse().map_err(|_| format!("`{part}` is not a core number"))?;
            if core < MAX_CORES { Ok(core) } else { Err(format!("core {core} is beyond {MAX_CORES}")) }
        };
        let mut cores = Vec::new();
        for part in text.split(',') {
            match part.split_once('-') {
                Some((first, last)) => cores.extend(number(first)?..=number(last)?),
                None => cores.push(number(part)?),
            }
        }
        cores.sort_unstable();
        cores.dedup();
        if cores.is_empty() { Err(format!("`{text}` names no core")) } else { Ok(Self(cores)) }
    }
}

impl fmt::Display for CoreList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&cores.join(","))
    }
}

impl FromStr for FaultPoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, file) = text.split_once('=').ok_or("a fault point is STAGE=FILE")?;
        let stage = FAULT_STAGES.iter().find(|(known, _)| *known == name);
        let &(_, stage) = stage.ok_or_else(|| {
            let known: Vec<&str> = FAULT_STAGES.iter().map(|(known, _)| *known).collect();
            format!("`{name}` is not a stage of a handoff: {}", known.join(", "))
        })?;
        Ok(Self(Fault { stage, trigger: file.into() }))
    }
}

impl fmt::Display for FaultPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, _) =
            FAULT_STAGES.iter().find(|(_, stage)| *stage == self.0.stage).expect("all are listed");
        write!(f, "{name}={}", self.0.trigger.display())
    }
}

impl RoleName {
    /// What it means to the engine.
    pub(crate) fn role(self) -> Role {
        match self {
            Self::Prefill => Role::Prefill,
            Self::Decode => Role::Decode,
            Self::Hybrid => Role::Hybrid,
        }
    }
}

impl KvCacheDtype {
    /// What it means to the engine.
    pub(crate) fn dtype(self) -> Option<KvDtype> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(KvDtype::F32),
            Self::F16 => Some(KvDtype::F16),
            Self::Bf16 => Some(KvDtype::Bf16),
            Self::Int8 => Some(KvDtype::Int8),
            Self::Fp8 => Some(KvDtype::Fp8),
        }
    }
}

impl AxisOrderName {
    /// What it means to the engine.
    pub(crate) fn order(self) -> AxisOrder {
        match self {
            Self::TokenHead => AxisOrder::TokenHead,
            Self::HeadToken => AxisOrder::HeadToken,
        }
    }
}

impl TransportName {
    /// What it means to the engine.
    pub(crate) fn choice(self) -> TransportChoice {
        match self {
            Self::Auto => TransportChoice::Auto,
            Self::Shm => TransportChoice::SharedMemory,
            Self::Rdma => TransportChoice::Rdma,
            Self::Tcp => TransportChoice::Tcp,
        }
    }
}

impl HandoffName {
    /// What it means to the engine.
    pub(crate) fn mode(self) -> HandoffMode {
        match self {
            Self::Push => HandoffMode::Push,
            Self::Pull => HandoffMode::Pull,
        }
    }
}

impl DigestName {
    /// What it means to the engine.
    pub(crate) fn coverage(self) -> DigestCoverage {
        match self {
            Self::Sampled => DigestCoverage::Sampled,
            Self::Full => DigestCoverage::Full,
        }
    }
}

/// The name of a value as it is typed.
pub(crate) fn typed<T: ValueEnum + Copy>(value: T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).expect("no value is hidden")
}

const FAULT_STAGES: [(&str, FaultStage); 3] = [
    ("before-reserve", FaultStage::BeforeReserve),
    ("pushing", FaultStage::Pushing),
    ("before-commit", FaultStage::BeforeCommit),
];

/// More cores than any machine has; keeps `0-99999999999` from filling memory.
const MAX_CORES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        #[rustfmt::skip]
        let rows = [
            ("1024",    Some(1024)),
            ("2GiB",    Some(2 << 30)),
            ("2g",      Some(2 << 30)),
            ("2 GiB",   Some(2 << 30)),
            ("512M",    Some(512 << 20)),
            ("1.5GiB",  Some(3 << 29)),
            ("1MB",     Some(1_000_000)),
            ("0",       None),
            ("",        None),
            ("2XB",     None),
            ("-1",      None),
            ("99999999TiB", None),
        ];
        for (text, expected) in rows {
            assert_eq!(text.parse::<ByteSize>().ok(), expected.map(ByteSize), "{text}");
        }
        assert_eq!(ByteSize(2 << 30).to_string().parse(), Ok(ByteSize(2 << 30)));
        assert_eq!(ByteSize(1000).to_string().parse(), Ok(ByteSize(1000)));
    }

    #[test]
    fn cores() {
        #[rustfmt::skip]
        let rows = [
            ("0",       Some(vec![0])),
            ("0-2,6",   Some(vec![0, 1, 2, 6])),
            ("3,1,1",   Some(vec![1, 3])),
            ("2-1",     None),
            ("a",       None),
            ("",        None),
            ("0-999999999", None),
        ];
        for (text, expected) in rows {
            assert_eq!(text.parse::<CoreList>().ok().map(|list| list.0), expected, "{text}");
        }
        assert_eq!(CoreList(vec![0, 5]).to_string().parse(), Ok(CoreList(vec![0, 5])));
    }
}
