//! How a checkpoint packs matrices that come in fewer bits: `quantization_config` in `config.json`.
//!
//! It says how packed tensors are to be read, not which are: that is seen by their names.

use serde_json::Value;

use super::error::ModelError;
use super::fields::Fields;

/// How packed matrices are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// `compressed-tensors`: int8 as bytes, or 4 or 8 bits in whole numbers of 32.
    Compressed {
        /// 4 or 8.
        bits: u32,
        /// Inputs that share a scale.
        share: Share,
        /// Whether all zero points are in the middle.
        symmetric: bool,
    },
    /// Codes of E4M3, by `compressed-tensors` or `fp8`.
    Fp8 {
        /// Outputs and inputs that share a scale; `None`: all inputs, of one output or of all.
        block: Option<[usize; 2]>,
    },
    /// GPTQ: 4 or 8 bits along the inputs.
    Gptq {
        /// 4 or 8.
        bits: u32,
        /// Inputs that share a scale.
        share: Share,
        /// Whether zero points are stored less one, as in all files but those of `gptq_v2`.
        less_one: bool,
    },
    /// AWQ for GEMM: 4 bits along the outputs.
    Awq {
        /// Inputs that share a scale.
        share: Share,
    },
}

/// Inputs of an output that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// All.
    Row,
    /// So many.
    Group(usize),
}

impl Packing {
    /// Reads `quantization_config`, if there is one.
    pub(super) fn read(config: &Fields<'_>) -> Result<Option<Self>, ModelError> {
        let Some(fields) = config.object("quantization_config", "quantization_config.")? else {
            return Ok(None);
        };
        match fields.text("quant_method")? {
            Some("compressed-tensors") => compressed(&fields).map(Some),
            Some("fp8") => fp8(&fields).map(Some),
            Some("gptq") => gptq(&fields).map(Some),
            Some("awq") => awq(&fields).map(Some),
            _ => Err(fields.unsupported("quant_method", "compressed-tensors, fp8, gptq, awq")),
        }
    }
}

fn compressed(fields: &Fields<'_>) -> Result<Packing, ModelError> {
    let formats = "int-quantized, float-quantized, naive-quantized, pack-quantized";
    match fields.text("format")? {
        Some("int-quantized" | "float-quantized" | "naive-quantized" | "pack-quantized") => {}
        _ => return Err(fields.unsupported("format", formats)),
    }
    let groups = fields.required("config_groups", fields.object("config_groups", CONFIG_GROUPS)?)?;
    let mut found = None;
    for name in groups.names() {
        let group = groups.required(name, groups.object(name, CONFIG_GROUP)?)?;
        if group.value("weights").is_none() {
            continue;
        }
        let weights = group.required("weights", group.object("weights", CONFIG_WEIGHTS)?)?;
        let packing = compressed_weights(&weights)?;
        if *found.get_or_insert(packing) != packing {
            return Err(fields.unsupported("config_groups", "one kind of weights for all groups"));
        }
    }
    fields.required("config_groups", found)
}

fn compressed_weights(weights: &Fields<'_>) -> Result<Packing, ModelError> {
    match weights.text("type")? {
        None | Some("int") => {}
        Some("float") => return compressed_floats(weights),
        Some(_) => return Err(weights.unsupported("type", "int, float")),
    }
    let bits = bits(weights, "num_bits")?;
    let share = match weights.text("strategy")? {
        Some("channel") => Share::Row,
        Some("group") => group(weights, "group_size")?,
        _ => return Err(weights.unsupported("strategy", "channel, group")),
    };
    let symmetric = weights.flag("symmetric")?.unwrap_or(true);
    Ok(Packing::Compressed { bits, share, symmetric })
}

fn compressed_floats(weights: &Fields<'_>) -> Result<Packing, ModelError> {
    if weights.count("num_bits")? != Some(8) {
        return Err(weights.unsupported("num_bits", "8"));
    }
    match weights.text("strategy")? {
        Some("channel" | "tensor") => Ok(Packing::Fp8 { block: None }),
        _ => Err(weights.unsupported("strategy", "channel, tensor")),
    }
}

fn fp8(fields: &Fields<'_>) -> Result<Packing, ModelError> {
    if !matches!(fields.text("fmt")?, None | Some("e4m3" | "float8_e4m3fn")) {
        return Err(fields.unsupported("fmt", "e4m3"));
    }
    let Some(sizes) = fields.value("weight_block_size") else {
        return Ok(Packing::Fp8 { block: None });
    };
    let size =
        |size: &Value| size.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| 0 < *size);
    match sizes.as_array().map(|sizes| sizes.iter().map(size).collect::<Vec<_>>()).as_deref() {
        Some(&[Some(outputs), Some(inputs)]) => Ok(Packing::Fp8 { block: Some([outputs, inputs]) }),
        _ => Err(fields.unsupported("weight_block_size", "two whole numbers from 1")),
    }
}

fn gptq(fields: &Fields<'_>) -> Result<Packing, ModelError> {
    let less_one = match fields.text("checkpoint_format")? {
        None | Some("gptq") => true,
        Some("gptq_v2") => false,
        Some(_) => return Err(fields.unsupported("checkpoint_format", "gptq, gptq_v2")),
    };
    if fields
        .object("dynamic", "quantization_config.dynamic.")?
        .is_some_and(|dynamic| dynamic.names().next().is_some())
    {
        return Err(fields.unsupported("dynamic", "one kind of weights for all layers"));
    }
    Ok(Packing::Gptq { bits: bits(fields, "bits")?, share: group(fields, "group_size")?, less_one })
}

fn awq(fields: &Fields<'_>) -> Result<Packing, ModelError> {
    if !matches!(fields.text("version")?, None | Some("gemm" | "GEMM")) {
        return Err(fields.unsupported("version", "gemm"));
    }
    let name = if fields.has("bits") { "bits" } else { "w_bit" };
    match fields.count(name)? {
        Some(4) => {}
        _ => return Err(fields.unsupported(name, "4")),
    }
    let name = if fields.has("group_size") { "group_size" } else { "q_group_size" };
    Ok(Packing::Awq { share: group(fields, name)? })
}

fn bits(fields: &Fields<'_>, name: &str) -> Result<u32, ModelError> {
    match fields.required(name, fields.count(name)?)? {
        bits @ (4 | 8) => Ok(bits),
        _ => Err(fields.unsupported(name, "4, 8")),
    }
}

/// A number of inputs, or -1 for all.
fn group(fields: &Fields<'_>, name: &str) -> Result<Share, ModelError> {
    let number = fields.required(name, fields.number(name)?)?;
    if number == -1.0 {
        return Ok(Share::Row);
    }
    let count = fields.count(name)?.filter(|count| *count % LEAST_GROUP == 0);
    count
        .map(|count| Share::Group(count as usize))
        .ok_or_else(|| fields.unsupported(name, "-1 and multiples of 8"))
}

/// What a whole number of 32 bits holds in 4 bits each.
const LEAST_GROUP: u32 = 8;
const CONFIG_GROUPS: &str = "quantization_config.config_groups.";
const CONFIG_GROUP: &str = "quantization_config.config_groups.*.";
const CONFIG_WEIGHTS: &str = "quantization_config.config_groups.*.weights.";
