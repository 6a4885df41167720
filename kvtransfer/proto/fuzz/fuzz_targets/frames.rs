//! Whatever bytes come, decoding neither panics nor makes a message that means something else when sent again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemill_kvtransfer_proto::codec::{FrameReader, encode};

fuzz_target!(|bytes: &[u8]| {
    let mut reader = FrameReader::new();
    reader.push(bytes);
    while let Ok(Some(message)) = reader.next_message() {
        let mut frame = Vec::new();
        encode(&message, &mut frame).expect("what was decoded is not too long");
        let mut again = FrameReader::new();
        again.push(&frame);
        assert_eq!(again.next_message(), Ok(Some(message)));
    }
});
