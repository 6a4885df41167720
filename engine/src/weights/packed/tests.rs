//! Each packing by a matrix of two words, written out by hand, and parts that do not fit.

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::*;
use crate::handle::Quantization;

/// A file of tensors.
fn file(tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (format!("p.{name}"), TensorView::new(*dtype, shape.clone(), bytes).expect("shape and bytes agree"))
    });
    safetensors::serialize(views, None).expect("it can be written")
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn floats(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// What a matrix is: its exact format and the values of its rows, or what is wrong with it.
fn read(
    packing: Packing,
    shape: [usize; 2],
    tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)],
) -> Result<(Option<Quantization>, Vec<Vec<f32>>), String> {
    let bytes = file(tensors);
    let file = SafeTensors::deserialize(&bytes).expect("it was just written");
    let tensors: BTreeMap<String, TensorView<'_>> = file.tensors().into_iter().collect();
    let parts = PackedParts::find(packing, &tensors, "p").expect("it is packed");
    let matrix = open(packing, &parts, &shape).map_err(|error| error.to_string())?;
    let row = |row| {
        let mut out = vec![0.0; shape[1]];
        matrix.values(row, &mut out);
        out
    };
    Ok((matrix.exact, (0..shape[0]).map(row).collect()))
}

const fn gptq(bits: u32, less_one: bool) -> Packing {
    Packing::Gptq { bits, share: Share::Row, less_one }
}

#[test]
fn gptq_packs_along_the_inputs() {
    let tensors = |zeros: u32| {
        vec![
            // Two outputs of eight inputs: 0 to 7 upwards, and 15 to 8 downwards.
            ("qweight", Dtype::I32, vec![1, 2], words(&[0x7654_3210, 0x89ab_cdef])),
            ("qzeros", Dtype::I32, vec![1, 1], words(&[zeros])),
            ("scales", Dtype::F32, vec![1, 2], floats(&[2.0, -1.0])),
        ]
    };
    let first = |zero: f32| (0..8).map(|step| (step as f32 - zero) * 2.0).collect::<Vec<_>>();
    let second = |zero: f32| (0..8).map(|step| zero - (15 - step) as f32).collect::<Vec<_>>();
    let int4 = Some(Quantization::Int4 { group: 128 });
    #[rustfmt::skip]
    let rows = [
        ("in the middle, less one",         0x77, true,  int4, [8.0, 8.0]),
        ("in the middle",                   0x88, false, int4, [8.0, 8.0]),
        ("elsewhere, less one",             0x28, true,  None, [9.0, 3.0]),
        ("elsewhere",                       0x31, false, None, [1.0, 3.0]),
        ("zero, less one",                  0xf7, true,  None, [8.0, 0.0]),
    ];
    for (name, zeros, less_one, exact, zero) in rows {
        let found = read(gptq(4, less_one), [2, 8], &tensors(zeros)).expect(name);
        assert_eq!(found, (exact, vec![first(zero[0]), second(zero[1])]), "zero points {name}");
    }
}

#[test]
fn inputs_may_name_their_groups() {
    let packing = Packing::Gptq { bits: 8, share: Share::Group(8), less_one: false };
    let tensors = |groups: &[u32]| {
        vec![
            ("qweight", Dtype::I32, vec![4, 1], words(&[0x8180_7f81; 4])),
            ("qzeros", Dtype::I32, vec![2, 1], words(&[0x80, 0x80])),
            ("scales", Dtype::F32, vec![2, 1], floats(&[1.0, 10.0])),
            ("g_idx", Dtype::I32, vec![16], words(groups)),
        ]
    };
    let mut groups: Vec<u32> = (0..16).map(|input| input / 8).collect();
    let (_, in_order) = read(packing, [1, 16], &tensors(&groups)).expect("they are in order");
    assert_eq!(in_order[0][..5], [1.0, -1.0, 0.0, 1.0, 1.0]);
    assert_eq!(in_order[0][8..13], [10.0, -10.0, 0.0, 10.0, 10.0]);
    groups.swap(1, 15);
    let (exact, turned) = read(packing, [1, 16], &tensors(&groups)).expect("each is a group");
    assert_eq!((exact, turned[0][1], turned[0][15]), (None, -10.0, 1.0));
    groups[3] = 2;
    let error = read(packing, [1, 16], &tensors(&groups)).expect_err("there are two groups");
    assert!(error.contains("`p.g_idx`") && error.contains("group 2 of 2"), "{error}");
}

#[test]
fn awq_packs_along_the_outputs() {
    // Eight outputs lie as 0, 2, 4, 6, 1, 3, 5, 7: output `n` has step `n` for the first input and 15 - n for the second.
    let tensors = |zeros: u32| {
        vec![
            ("qweight", Dtype::I32, vec![2, 1], words(&[0x7531_6420, 0x8ace_9bdf])),
            ("qzeros", Dtype::I32, vec![1, 1], words(&[zeros])),
            ("scales", Dtype::F32, vec![1, 8], floats(&[1.0; 8])),
        ]
    };
    let expected = |zero: fn(i32) -> i32| -> Vec<Vec<f32>> {
        (0..8).map(|output| [output, 15 - output].map(|step| (step - zero(output)) as f32).to_vec()).collect()
    };
    let packing = Packing::Awq { share: Share::Row };
    let middle = read(packing, [8, 2], &tensors(0x8888_8888)).expect("all parts fit");
    assert_eq!(middle, (Some(Quantization::Int4 { group: 128 }), expected(|_| 8)));
    let own = read(packing, [8, 2], &tensors(0x7531_6420)).expect("all parts fit");
    assert_eq!(own, (None, expected(|output| output)));
}

#[test]
fn compressed_tensors_are_bytes_or_words() {
    let packing = |bits, symmetric| Packing::Compressed { bits, share: Share::Row, symmetric };
    let scales = || ("weight_scale", Dtype::F32, vec![2, 1], floats(&[1.0, 2.0]));
    let bytes = |numbers: [i8; 4]| numbers.map(i8::cast_unsigned).to_vec();
    let whole = || ("weight", Dtype::I8, vec![2, 2], bytes([-128, 127, 3, -4]));
    let int8 = Some(Quantization::Int8);
    let found = read(packing(8, true), [2, 2], &[whole(), scales()]);
    assert_eq!(found, Ok((int8, vec![vec![-128.0, 127.0], vec![6.0, -8.0]])));

    let zeros = ("weight_zero_point", Dtype::I8, vec![2, 1], vec![1, 0xfe]);
    let found = read(packing(8, false), [2, 2], &[whole(), scales(), zeros]);
    assert_eq!(found, Ok((None, vec![vec![-129.0, 126.0], vec![10.0, -4.0]])));

    let packed = || ("weight_packed", Dtype::I32, vec![2, 1], words(&[0x0f, 0x87]));
    let found = read(packing(4, true), [2, 2], &[packed(), scales()]);
    assert_eq!(found, Ok((Some(Quantization::Int4 { group: 128 }), vec![vec![7.0, -8.0], vec![-2.0, 0.0]])));

    // Zero points 1 and -1, as 9 and 7.
    let zeros = ("weight_zero_point", Dtype::I32, vec![1, 1], words(&[0x79]));
    let found = read(packing(4, false), [2, 2], &[packed(), scales(), zeros]);
    assert_eq!(found, Ok((None, vec![vec![6.0, -9.0], vec![0.0, 2.0]])));
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let steps = |rows| ("qweight", Dtype::I32, vec![rows, 2], words(&vec![0; rows * 2]));
    let zeros = || ("qzeros", Dtype::I32, vec![1, 1], words(&[0x77]));
    let scales = |dtype| ("scales", dtype, vec![1, 2], floats(&[1.0, 1.0]));
    #[rustfmt::skip]
    let rows = [
        ("too few steps",   vec![steps(1), zeros(), scales(Dtype::F32)],    "`p.qweight` cannot be unpacked: its shape is [1, 2] instead of [2, 2]"),
        ("no zero points",  vec![steps(2), scales(Dtype::F32)],             "`p.qzeros` cannot be unpacked: it is missing"),
        ("whole scales",    vec![steps(2), zeros(), scales(Dtype::I32)],    "`p.scales` cannot be unpacked: it is stored as I32"),
    ];
    for (name, tensors, expected) in rows {
        let error = read(gptq(4, true), [2, 16], &tensors).expect_err(name);
        assert!(error.contains(expected), "{name}: {error}");
    }
}
