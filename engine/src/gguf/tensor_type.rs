//! How the elements of a tensor are stored: numbers that the format's makers gave out.

use std::fmt;

/// Type of a tensor by its number in the file, known or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TensorType(pub u32);

impl TensorType {
    /// Single precision.
    pub const F32: Self = Self(0);
    /// Half precision.
    pub const F16: Self = Self(1);
    /// bfloat16.
    pub const BF16: Self = Self(30);
    /// 4 bits, a scale per 32.
    pub const Q4_0: Self = Self(2);
    /// 4 bits, a scale and a least value per 32.
    pub const Q4_1: Self = Self(3);
    /// 5 bits, a scale per 32.
    pub const Q5_0: Self = Self(6);
    /// 5 bits, a scale and a least value per 32.
    pub const Q5_1: Self = Self(7);
    /// 8 bits, a scale per 32.
    pub const Q8_0: Self = Self(8);
    /// 4 bits, a scale and a least value of 6 bits per 32, a scale of those per 256.
    pub const Q4_K: Self = Self(12);
    /// The same with 5 bits.
    pub const Q5_K: Self = Self(13);
    /// 6 bits, a scale of 8 bits per 16, a scale of those per 256.
    pub const Q6_K: Self = Self(14);

    /// Elements and bytes of a block; `None` for types that this engine does not read.
    pub const fn block(self) -> Option<(usize, usize)> {
        Some(match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
            _ => return None,
        })
    }

    /// The names of all types that are read.
    pub fn supported() -> String {
        let read = NAMES.iter().filter(|(number, _)| Self(*number).block().is_some());
        read.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(number, _)| *number == self.0) {
            Some((_, name)) => formatter.write_str(name),
            None => write!(formatter, "type {}", self.0),
        }
    }
}

const NAMES: [(u32, &str); 33] = [
    (0, "F32"),
    (1, "F16"),
    (30, "BF16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];
