//! Products of matrices that NVIDIA's library for them (cuBLASLt) may be asked for in place of a kernel of ours.

use super::{DeviceAddress, Product};
use crate::matrix::WeightDtype;

/// What [`Product`] says, with the types that a kernel of ours has in its name.
#[derive(Clone, Copy, Debug)]
pub struct MatrixProduct {
    /// Type of `x`, `w` and `bias`.
    pub dtype: WeightDtype,
    /// Whether `out` is f32, and not of the same type.
    pub to_f32: bool,
    /// Sizes and addresses.
    pub product: Product,
}

impl MatrixProduct {
    /// Whether the library takes it: whole packs of 16 bytes at addresses that are multiples of 16, and no bias of another type than the
    /// result.
    pub const fn fits(&self) -> bool {
        let Product { out, x, w, bias, rows, inputs, outputs, .. } = self.product;
        let size = self.dtype.bytes();
        let packs = (inputs as usize * size).is_multiple_of(PACK as usize)
            && (outputs as usize * self.out_dtype().bytes()).is_multiple_of(PACK as usize);
        let aligned = (out.0 | x.0 | w.0 | bias.0).is_multiple_of(PACK);
        let of_one_type =
            bias.0 == DeviceAddress::NULL.0 || !self.to_f32 || matches!(self.dtype, WeightDtype::F32);
        0 < rows && 0 < inputs && 0 < outputs && packs && aligned && of_one_type
    }

    /// Type of `out`.
    pub const fn out_dtype(&self) -> WeightDtype {
        if self.to_f32 { WeightDtype::F32 } else { self.dtype }
    }
}

/// Bytes that the library's fast kernels move at once.
const PACK: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_takes_whole_packs() {
        let fits = |dtype, to_f32, inputs, outputs, x, bias| {
            let [out, w] = [DeviceAddress(256), DeviceAddress(512)];
            let (x, bias) = (DeviceAddress(x), DeviceAddress(bias));
            let product = Product { out, x, w, bias, rows: 3, inputs, outputs, adds: 0 };
            MatrixProduct { dtype, to_f32, product }.fits()
        };
        use WeightDtype::{Bf16, F32};
        #[rustfmt::skip]
        let rows = [
            ("packs of bf16",              Bf16, false, 64, 40, 1024, 0,    true),
            ("packs of f32",               F32,  false, 4,  4,  1024, 1040, true),
            ("inputs of no whole packs",   Bf16, false, 68, 40, 1024, 0,    false),
            ("outputs of no whole packs",  Bf16, false, 64, 36, 1024, 0,    false),
            ("outputs in f32",             Bf16, true,  64, 36, 1024, 0,    true),
            ("x between packs",            Bf16, false, 64, 40, 1032, 0,    false),
            ("a bias of the result",       Bf16, false, 64, 40, 1024, 2048, true),
            ("a bias of another type",     Bf16, true,  64, 40, 1024, 2048, false),
            ("nothing",                    Bf16, false, 0,  40, 1024, 0,    false),
        ];
        for (row, dtype, to_f32, inputs, outputs, x, bias, expected) in rows {
            assert_eq!(fits(dtype, to_f32, inputs, outputs, x, bias), expected, "{row}");
        }
    }
}
