//! What kernels compute, written for somebody else to compute again: `scripts/gpu-check.sh` has torch do it.
//!
//! A folder gets a line of JSON for each case in `cases.jsonl` and its tensors as files of f32, row by row. Inputs are rounded to the
//! type of the case before they are written, so that who computes again begins with the same numbers.

use super::{
    on_device,
    support::{
        Blocks, Numbers, Order,
        cuda::{Buffer, DeviceBlocks, block_table, elements, floats, rounded, tolerance},
        shape,
    },
};
use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};
use tidemill_kernels::{
    cuda::{
        Attention, DeviceAddress, Driver, KvShape, Product, PromptAttention, PromptTile, RmsNorm, SiluMul,
        hopper, launches,
    },
    kv::KvDtype,
    matrix::WeightDtype,
    reference,
    step::SequenceRows,
};

/// Names the folder.
const FOLDER: &str = "TIDEMILL_EXCHANGE";
/// Asks for sizes of real models, which would take the emulator hours.
const LARGE: &str = "TIDEMILL_EXCHANGE_LARGE";

#[test]
#[ignore = "needs a folder in TIDEMILL_EXCHANGE: `scripts/gpu-check.sh` computes the same with torch"]
fn written_for_others() {
    let folder = PathBuf::from(env::var_os(FOLDER).expect("the folder is named"));
    let large = env::var_os(LARGE).is_some();
    on_device(|device| {
        let mut exchange = Exchange { device, folder: &folder, cases: String::new(), count: 0 };
        for dtype in [WeightDtype::F32, WeightDtype::F16, WeightDtype::Bf16] {
            exchange.all(dtype, large);
        }
        fs::write(folder.join("cases.jsonl"), exchange.cases).expect("there is room");
    });
}

struct Exchange<'a> {
    device: &'a dyn Driver,
    folder: &'a Path,
    cases: String,
    count: usize,
}

impl Exchange<'_> {
    fn all(&mut self, dtype: WeightDtype, large: bool) {
        let products: &[_] = if large {
            &[(1, 4096, 4096), (8, 4096, 14_336), (64, 4096, 4096), (300, 4096, 1024)]
        } else {
            &[(1, 64, 40), (9, 296, 6)]
        };
        for &(rows, inputs, outputs) in products {
            self.product(dtype, rows, inputs, outputs);
        }
        let (rows, width) = if large { (64, 4096) } else { (3, 300) };
        self.rms_norm(dtype, rows, width);
        self.silu_mul(dtype, rows, if large { 14_336 } else { 40 });
        let contexts: &[usize] = if large { &[1, 17, 512, 513, 8192] } else { &[1, 17, 600] };
        for (heads, kv_heads, head_size) in [(8, 2, 64), (8, 1, 128), (4, 4, 256)] {
            self.attention(dtype, heads, kv_heads, head_size, contexts);
            self.prompt(dtype, heads, kv_heads, head_size, if large { 1000 } else { 70 });
        }
    }

    /// Notes a case with its tensors; `numbers` are further fields as JSON.
    fn note(&mut self, operation: &str, dtype: WeightDtype, numbers: &str, tensors: &[(&str, &[f32])]) {
        let mut files = String::new();
        for (name, values) in tensors {
            let file = format!("{}-{operation}-{name}.f32", self.count);
            fs::write(self.folder.join(&file), bytemuck::cast_slice(values)).expect("there is room");
            write!(files, r#", "{name}": "{file}""#).expect("text grows");
        }
        let dtype_name = format!("{dtype:?}").to_lowercase();
        let tolerance = tolerance(dtype);
        writeln!(
            self.cases,
            r#"{{"operation": "{operation}", "dtype": "{dtype_name}", "tolerance": {tolerance}, {numbers}{files}}}"#
        )
        .expect("text grows");
        self.count += 1;
    }

    fn product(&mut self, dtype: WeightDtype, rows: usize, inputs: usize, outputs: usize) {
        let mut numbers = Numbers::new(80);
        let [x, w] = [rows, outputs].map(|count| rounded(&numbers.vector(count * inputs), dtype));
        let [on_device, weights] = [&x, &w].map(|values| elements(self.device, values, dtype));
        let out = Buffer::empty(self.device, rows * outputs * dtype.bytes());
        let parameters = Product {
            out: out.address(),
            x: on_device.address(),
            w: weights.address(),
            bias: DeviceAddress::NULL,
            rows: rows as u32,
            inputs: inputs as u32,
            outputs: outputs as u32,
            adds: 0,
        };
        let usual = launches::product(dtype, false, &parameters);
        let wide = hopper::multiply(self.device.properties(), dtype, false, &parameters);
        for launch in [Some(usual), wide].into_iter().flatten() {
            self.device.launch(&launch).expect("kernels run");
            let kernel = launch.kernel;
            let sizes =
                format!(r#""kernel": "{kernel}", "rows": {rows}, "inputs": {inputs}, "outputs": {outputs}"#);
            self.note("product", dtype, &sizes, &[("x", &x), ("w", &w), ("out", &floats(&out, dtype))]);
        }
    }

    fn rms_norm(&mut self, dtype: WeightDtype, rows: usize, width: usize) {
        let mut numbers = Numbers::new(81);
        let [x, w] = [rows, 1].map(|count| rounded(&numbers.vector(count * width), dtype));
        let [state, weight] = [&x, &w].map(|values| elements(self.device, values, dtype));
        let out = Buffer::empty(self.device, rows * width * dtype.bytes());
        let parameters = RmsNorm {
            out: out.address(),
            state: state.address(),
            delta: DeviceAddress::NULL,
            weight: weight.address(),
            width: width as u32,
            eps: 1e-5,
        };
        self.device.launch(&launches::rms_norm(dtype, rows as u32, &parameters)).expect("kernels run");
        let sizes = format!(r#""rows": {rows}, "width": {width}, "eps": 1e-5"#);
        self.note("rms_norm", dtype, &sizes, &[("x", &x), ("w", &w), ("out", &floats(&out, dtype))]);
    }

    fn silu_mul(&mut self, dtype: WeightDtype, rows: usize, width: usize) {
        let mut numbers = Numbers::new(82);
        let [gate, up] = [6.0, 1.0].map(|reach| {
            let values: Vec<f32> = numbers.vector(rows * width).iter().map(|x| reach * x).collect();
            rounded(&values, dtype)
        });
        let [on_device, factor] = [&gate, &up].map(|values| elements(self.device, values, dtype));
        let out = Buffer::empty(self.device, rows * width * dtype.bytes());
        let parameters = SiluMul {
            out: out.address(),
            gate: on_device.address(),
            up: factor.address(),
            width: width as u32,
            stride: width as u32,
        };
        self.device.launch(&launches::silu_mul(dtype, rows as u32, &parameters)).expect("kernels run");
        let sizes = format!(r#""rows": {rows}, "width": {width}"#);
        self.note("silu_mul", dtype, &sizes, &[("gate", &gate), ("up", &up), ("out", &floats(&out, dtype))]);
    }

    /// A whole prompt, by the kernel that takes rows together, where the type has one.
    fn prompt(&mut self, dtype: WeightDtype, heads: usize, kv_heads: usize, head_size: usize, tokens: usize) {
        let kv_dtype = match dtype {
            WeightDtype::F32 => return,
            WeightDtype::F16 => KvDtype::F16,
            WeightDtype::Bf16 => KvDtype::Bf16,
        };
        let mut numbers = Numbers::new(84);
        let shape = shape(kv_dtype, 1, 16, kv_heads, head_size, Order::TokenHead);
        let (width, row) = (heads * head_size, kv_heads * head_size);
        let spread: Vec<f32> = numbers.vector(tokens * width).iter().map(|x| 4.0 * x).collect();
        let query = rounded(&spread, dtype);
        let [key, value] = [0, 1].map(|_| rounded(&numbers.vector(tokens * row), dtype));
        let blocks = Blocks::new(shape, tokens);
        let all = SequenceRows { first_row: 0, rows: tokens, first_position: 0, blocks: &blocks.addresses };
        reference::write_kv(&shape, 0, &key, &value, &[all]);
        let paged = DeviceBlocks::copy_of(self.device, shape, &blocks);
        let tiles: Vec<PromptTile> = PromptTile::cut(0, tokens as u32, 0, 0).collect();
        let on_device = elements(self.device, &query, dtype);
        let cut = Buffer::new(self.device, &tiles);
        let out = Buffer::empty(self.device, tokens * width * dtype.bytes());
        let parameters = PromptAttention {
            out: out.address(),
            query: on_device.address(),
            blocks: paged.table(),
            tiles: cut.address(),
            shape: KvShape::new(&shape),
            layer: 0,
            blocks_per_sequence: tokens.div_ceil(shape.block_len) as u32,
            query_heads: heads as u32,
            query_stride: width as u32,
            window: 0,
            scale: Attention::scale((head_size as f32).sqrt().recip()),
        };
        let (count, properties, range) = (tiles.len() as u32, self.device.properties(), paged.range());
        let usual = launches::attend_prompts(dtype, count, &parameters).expect("16 bits");
        let wide = hopper::attend_prompts(properties, dtype, count, tokens as u32, &range, &parameters);
        for launch in [Some(usual), wide].into_iter().flatten() {
            self.device.launch(&launch).expect("kernels run");
            let kernel = launch.kernel;
            let sizes = format!(
                r#""kernel": "{kernel}", "heads": {heads}, "kv_heads": {kv_heads}, "head_size": {head_size}, "tokens": {tokens}"#
            );
            let out = floats(&out, dtype);
            let tensors = [("query", &query[..]), ("key", &key), ("value", &value), ("out", &out)];
            self.note("prompt", dtype, &sizes, &tensors);
        }
    }

    /// One new token of each of some sequences, whose keys and values lie in paged blocks of the same type.
    fn attention(
        &mut self,
        dtype: WeightDtype,
        heads: usize,
        kv_heads: usize,
        head_size: usize,
        contexts: &[usize],
    ) {
        let mut numbers = Numbers::new(83);
        let kv_dtype = match dtype {
            WeightDtype::F32 => KvDtype::F32,
            WeightDtype::F16 => KvDtype::F16,
            WeightDtype::Bf16 => KvDtype::Bf16,
        };
        let shape = shape(kv_dtype, 1, 16, kv_heads, head_size, Order::HeadToken);
        let (rows, width, row) = (contexts.len(), heads * head_size, kv_heads * head_size);
        let spread: Vec<f32> = numbers.vector(rows * width).iter().map(|x| 4.0 * x).collect();
        let query = rounded(&spread, dtype);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut paged = Vec::new();
        for &context in contexts {
            let [key, value] = [0, 1].map(|_| rounded(&numbers.vector(context * row), dtype));
            let blocks = Blocks::new(shape, context);
            let all =
                SequenceRows { first_row: 0, rows: context, first_position: 0, blocks: &blocks.addresses };
            reference::write_kv(&shape, 0, &key, &value, &[all]);
            paged.push(DeviceBlocks::copy_of(self.device, shape, &blocks));
            keys.extend(key);
            values.extend(value);
        }
        let longest = contexts.iter().copied().max().expect("there are some");
        let blocks_per_sequence = longest.div_ceil(shape.block_len);
        let table = block_table(&paged, blocks_per_sequence);
        let splits = Attention::splits(longest as u32);
        let table = Buffer::new(self.device, &table);
        let on_device = elements(self.device, &query, dtype);
        let out = Buffer::empty(self.device, rows * width * dtype.bytes());
        let partials = rows * heads * splits as usize * (head_size + 2) * size_of::<f32>();
        let partials = Buffer::empty(self.device, partials);
        let positions: Vec<u32> = contexts.iter().map(|&context| context as u32 - 1).collect();
        let positions = Buffer::new(self.device, &positions);
        let sequences = Buffer::new(self.device, &(0..rows as u32).collect::<Vec<_>>());
        let parameters = Attention {
            out: out.address(),
            query: on_device.address(),
            blocks: table.address(),
            positions: positions.address(),
            sequences: sequences.address(),
            partials: partials.address(),
            shape: KvShape::new(&shape),
            dtype: dtype.into(),
            layer: 0,
            blocks_per_sequence: blocks_per_sequence as u32,
            query_heads: heads as u32,
            query_stride: width as u32,
            window: 0,
            splits,
            scale: Attention::scale((head_size as f32).sqrt().recip()),
        };
        let (attend, join) = launches::attention(rows as u32, &parameters);
        self.device.launch(&attend).expect("kernels run");
        if let Some(join) = join {
            self.device.launch(&join).expect("kernels run");
        }
        let sizes = format!(
            r#""heads": {heads}, "kv_heads": {kv_heads}, "head_size": {head_size}, "contexts": {contexts:?}"#
        );
        let out = floats(&out, dtype);
        let tensors = [("query", &query[..]), ("key", &keys), ("value", &values), ("out", &out)];
        self.note("attention", dtype, &sizes, &tensors);
    }
}
