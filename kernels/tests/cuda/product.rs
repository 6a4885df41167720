//! Matrix products of few rows.

use super::{
    on_devices,
    support::{
        Numbers, WEIGHT_DTYPES, assert_close, assert_same_bits,
        cuda::{Buffer, elements, floats, rounded, tolerance},
    },
};
use tidemill_kernels::{
    cuda::{DeviceAddress, Driver, Launch, Product, launches},
    matrix::WeightDtype,
    reference,
};

#[derive(Clone)]
pub(super) struct Case {
    pub(super) dtype: WeightDtype,
    pub(super) inputs: usize,
    pub(super) x: Vec<f32>,
    pub(super) w: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    /// What `out` has before, where the product is added to it.
    pub(super) before: Option<Vec<f32>>,
    /// Type of `out`: that of the others or f32.
    pub(super) out: WeightDtype,
}

/// Rows, inputs and outputs, whether there is a bias, and whether the product is added to what is there.
pub(super) type Size = (usize, usize, usize, bool, bool);

impl Case {
    pub(super) fn new(size: Size, dtype: WeightDtype, out: WeightDtype, seed: u64) -> Self {
        let ((rows, inputs, outputs, has_bias, adds), mut numbers) = (size, Numbers::new(seed));
        let mut values = |len, dtype| rounded(&numbers.vector(len), dtype);
        Self {
            dtype,
            inputs,
            x: values(rows * inputs, dtype),
            w: values(outputs * inputs, dtype),
            bias: has_bias.then(|| values(outputs, dtype)),
            before: adds.then(|| values(rows * outputs, out)),
            out,
        }
    }

    /// What the reference makes of it.
    fn expected(&self) -> Vec<f32> {
        let mut expected = vec![f32::NAN; self.x.len() / self.inputs * (self.w.len() / self.inputs)];
        reference::matmul(&mut expected, &self.x, &self.w, self.inputs, self.bias.as_deref());
        if let Some(before) = &self.before {
            reference::add(&mut expected, before);
        }
        expected
    }

    /// Fails where what a kernel made of it is not near to that.
    pub(super) fn check(&self, found: &[f32]) {
        let Self { dtype, inputs, out, .. } = self;
        let (rows, outputs) = (self.x.len() / inputs, self.w.len() / inputs);
        let (has_bias, adds) = (self.bias.is_some(), self.before.is_some());
        let name = format!("{rows}x{inputs}x{outputs} {dtype:?} to {out:?}, bias: {has_bias}, adds: {adds}");
        assert_close(found, &self.expected(), tolerance(*out), &name);
    }
}

/// Fails where some neighbouring rows, each given by the first and how many, come to other bits than in the product of all rows.
pub(super) fn check_company(
    [rows, inputs, outputs]: [usize; 3],
    seed: u64,
    parts: &[(usize, usize)],
    multiply: impl Fn(&Case) -> Vec<f32>,
) {
    let all = Case::new((rows, inputs, outputs, false, false), WeightDtype::Bf16, WeightDtype::Bf16, seed);
    let together = multiply(&all);
    for &(first, count) in parts {
        let x = all.x[first * inputs..(first + count) * inputs].to_vec();
        let found = multiply(&Case { x, ..all.clone() });
        let expected = &together[first * outputs..(first + count) * outputs];
        assert_same_bits(&found, expected, &format!("{count} rows from {first} on"));
    }
}

fn multiply(device: &dyn Driver, case: &Case) -> Vec<f32> {
    multiply_by(device, case, |parameters| match case.out == case.dtype {
        true => launches::multiply(case.dtype, parameters),
        false => launches::multiply_to_f32(case.dtype, parameters),
    })
}

/// The same by the kernel that `launch` chooses.
pub(super) fn multiply_by(device: &dyn Driver, case: &Case, launch: impl Fn(&Product) -> Launch) -> Vec<f32> {
    let Case { dtype, inputs, x, w, bias, before, out: to } = case;
    let (rows, outputs) = (x.len() / inputs, w.len() / inputs);
    let [x, w] = [x, w].map(|values| elements(device, values, *dtype));
    let bias = bias.as_ref().map(|bias| elements(device, bias, *dtype));
    let out = match before {
        Some(before) => elements(device, before, *to),
        None => Buffer::empty(device, rows * outputs * to.bytes()),
    };
    let parameters = Product {
        out: out.address(),
        x: x.address(),
        w: w.address(),
        bias: bias.as_ref().map_or(DeviceAddress::NULL, Buffer::address),
        rows: rows as u32,
        inputs: *inputs as u32,
        outputs: outputs as u32,
        adds: u32::from(before.is_some()),
    };
    device.launch(&launch(&parameters)).expect("kernels run");
    floats(&out, *to)
}

#[test]
fn few_rows() {
    on_devices(|device| {
        for dtype in WEIGHT_DTYPES {
            for (rows, inputs, outputs) in
                [(1, 1, 1), (1, 512, 33), (3, 7, 5), (8, 64, 4), (9, 296, 6), (17, 300, 3)]
            {
                for (has_bias, adds) in [(false, false), (true, false), (true, true)] {
                    let case = Case::new((rows, inputs, outputs, has_bias, adds), dtype, dtype, 70);
                    case.check(&multiply(device, &case));
                }
            }
        }
    });
}

#[test]
fn logits_are_not_rounded_to_the_type_of_weights() {
    on_devices(|device| {
        for dtype in WEIGHT_DTYPES {
            for (rows, inputs, outputs) in [(1, 64, 9), (3, 7, 5), (9, 64, 4)] {
                let case = Case::new((rows, inputs, outputs, false, false), dtype, WeightDtype::F32, 72);
                case.check(&multiply(device, &case));
            }
        }
    });
}

#[test]
fn a_row_is_the_same_in_any_company() {
    on_devices(|device| {
        for (dtype, inputs) in WEIGHT_DTYPES.into_iter().flat_map(|dtype| [(dtype, 264), (dtype, 301)]) {
            let (rows, outputs, mut numbers) = (11, 7, Numbers::new(71));
            let [x, w] = [rows, outputs].map(|count| rounded(&numbers.vector(count * inputs), dtype));
            let case = |x: &[f32]| {
                let (x, w) = (x.to_vec(), w.clone());
                Case { dtype, inputs, x, w, bias: None, before: None, out: dtype }
            };
            let together = multiply(device, &case(&x));
            let alone: Vec<f32> = x.chunks(inputs).flat_map(|row| multiply(device, &case(row))).collect();
            assert_same_bits(&alone, &together, &format!("{dtype:?}, {inputs} inputs"));
        }
    });
}
