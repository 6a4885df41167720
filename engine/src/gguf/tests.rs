//! Files that are cut short, that lie about their sizes, and that are made of anything: an error each, never a panic.

use proptest::prelude::*;

use super::*;

/// A file in the making.
#[derive(Clone, Debug, Default)]
struct Written(Vec<u8>);

impl Written {
    fn new(tensors: u64, values: u64) -> Self {
        let mut file = Self(b"GGUF\x03\0\0\0".to_vec());
        file.0.extend(tensors.to_le_bytes());
        file.0.extend(values.to_le_bytes());
        file
    }

    fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn text(mut self, text: &str) -> Self {
        self = self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
        self
    }

    fn tensor(self, name: &str, extents: &[u64], kind: u32, offset: u64) -> Self {
        let file = self.text(name).u32(extents.len() as u32);
        extents.iter().fold(file, |file, extent| file.u64(*extent)).u32(kind).u64(offset)
    }

    fn data(mut self, bytes: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32) + bytes, 7);
        self.0
    }
}

fn whole() -> Vec<u8> {
    Written::new(2, 5)
        .text("general.architecture")
        .u32(8)
        .text("llama")
        .text("llama.block_count")
        .u32(4)
        .u32(2)
        .text("llama.rope.freq_base")
        .u32(6)
        .u32(10_000f32.to_bits())
        .text("tokenizer.ggml.tokens")
        .u32(9)
        .u32(8)
        .u64(2)
        .text("a")
        .text("bc")
        .text("tokenizer.ggml.scores")
        .u32(9)
        .u32(6)
        .u64(2)
        .u32(0)
        .u32((-1.5f32).to_bits())
        .tensor("one", &[32, 3], 2, 0)
        .tensor("two", &[4], 0, 64)
        .data(64 + 16)
}

#[test]
fn a_whole_file_is_read() {
    let bytes = whole();
    let header = GgufHeader::parse(&bytes).expect("it is whole");
    assert_eq!(header.text("general.architecture").expect("a text"), Some("llama"));
    assert_eq!(header.count("llama.block_count").expect("a number"), Some(2));
    assert_eq!(header.number("llama.rope.freq_base").expect("a number"), Some(10_000.0));
    assert_eq!(header.count("absent").expect("absent is no error"), None);
    assert!(header.count("general.architecture").is_err() && header.flag("llama.block_count").is_err());
    let array = |key: &str| match header.value(key) {
        Some(GgufValue::Array(array)) => array.clone(),
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(array("tokenizer.ggml.tokens").texts(&bytes), Some(vec!["a", "bc"]));
    assert_eq!(array("tokenizer.ggml.tokens").numbers(&bytes), None);
    assert_eq!(array("tokenizer.ggml.scores").numbers(&bytes), Some(vec![0.0, -1.5]));
    assert_eq!(header.tensors()["one"].shape, [3, 32], "rows first");
    assert_eq!(header.data_of(&bytes, "one").expect("it is there").len(), 3 * 18);
    assert_eq!(header.data_of(&bytes, "two").expect("it is there").len(), 16);
}

#[test]
fn broken_files_are_told_what_is_wrong() {
    const MUCH: u64 = u64::MAX / 2;
    let value = |kind: u32| Written::new(0, 1).text("k").u32(kind);
    #[rustfmt::skip]
    let rows: Vec<(&str, Vec<u8>, &str)> = vec![
        ("nothing",                         vec![],                                                     "0 bytes and ends within the file's first"),
        ("another format",                  b"PK\x03\x04 and so on".to_vec(),                           "letters GGUF"),
        ("the first version",               b"GGUF\x01\0\0\0".to_vec(),                                 "version 1"),
        ("a big-endian file",               b"GGUF\0\0\0\x03".to_vec(),                                 "version 50331648"),
        ("more values than bytes",          Written::new(0, MUCH).0,                                    "ends within a key"),
        ("more tensors than bytes",         Written::new(MUCH, 0).0,                                    "ends within the name of a tensor"),
        ("a key as long as memory",         Written::new(0, 1).u64(MUCH).0,                             "ends within a key"),
        ("a text as long as memory",        value(8).u64(u64::MAX).0,                                   "ends within a value"),
        ("an array as long as memory",      value(9).u32(4).u64(MUCH).0,                                "ends within an array"),
        ("an array of many texts",          value(9).u32(8).u64(MUCH).0,                                "ends within a text of an array"),
        ("an array of arrays",              value(9).u32(9).u64(1).0,                                   "array of arrays"),
        ("a value of no type",              value(77).0,                                                "`k` is of type 77"),
        ("an array of no type",             value(9).u32(99).u64(0).0,                                  "`k` is of type 99"),
        ("a key that is no text",           { let mut file = Written::new(0, 1).u64(1); file.0.push(0xff); file.0 }, "a key at 32 is not UTF-8"),
        ("a value twice",                   Written::new(0, 2).text("k").u32(4).u32(1).text("k").u32(4).u32(1).0, "`k` is there twice"),
        ("a tensor twice",                  Written::new(2, 0).tensor("t", &[4], 0, 0).tensor("t", &[4], 0, 0).data(16), "`t` is there twice"),
        ("an alignment of three",           Written::new(0, 1).text("general.alignment").u32(4).u32(3).0, "a power of two"),
        ("too many dimensions",             Written::new(1, 0).tensor("t", &[1; 5], 0, 0).data(4),      "5 dimensions"),
        ("more elements than can be",       Written::new(1, 0).tensor("t", &[MUCH, MUCH], 0, 0).data(4), "more elements than can be"),
        ("a tensor beyond the end",         Written::new(1, 0).tensor("t", &[32, 2], 8, 0).data(67),    "beyond the 99 bytes"),
        ("a tensor that begins beyond it",  Written::new(1, 0).tensor("t", &[1], 0, 1 << 60).data(4),   "tensor `t` goes beyond"),
        ("a place that is not aligned",     Written::new(1, 0).tensor("t", &[1], 0, 8).data(64),        "begins at 8, no multiple of 32"),
        ("a part of a block",               Written::new(1, 0).tensor("t", &[33], 8, 0).data(68),       "rows of 33 elements, no multiple of the 32 in a block of Q8_0"),
    ];
    for (name, bytes, expected) in rows {
        let text = GgufHeader::parse(&bytes).expect_err(name).to_string();
        let size = format!("{} bytes", bytes.len());
        let expected = expected.replace("99 bytes", &size);
        assert!(text.contains(&expected), "{name}: {expected:?} in {text:?}");
    }
}

#[test]
fn every_cut_is_an_error() {
    let bytes = whole();
    for length in 0..bytes.len() {
        assert!(GgufHeader::parse(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
    }
}

/// Reads all that the header names.
fn read_all(bytes: &[u8]) {
    let Ok(header) = GgufHeader::parse(bytes) else { return };
    for name in header.tensors().keys() {
        let data = header.data_of(bytes, name).expect("the header has been checked");
        assert!(data.len() <= bytes.len());
    }
    for value in header.metadata().values() {
        if let GgufValue::Array(array) = value {
            let (texts, numbers) = (array.texts(bytes), array.numbers(bytes));
            assert!(texts.is_none_or(|texts| texts.len() < bytes.len()));
            assert!(numbers.is_none_or(|numbers| numbers.len() < bytes.len()));
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        read_all(&bytes);
        read_all(&[&Written::new(1, 1).0[..], &bytes].concat());
    }

    #[test]
    fn changed_bytes_are_read_or_refused(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = whole();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        read_all(&bytes);
    }
}
