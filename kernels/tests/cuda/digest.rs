//! Digests of granules, against the hash of the CPU.

use super::{
    on_devices,
    support::{Numbers, cuda::Buffer},
};
use tidemill_kernels::cuda::{
    DeviceAddress, DigestGranules, DigestSamples, GranuleOfBlock, SampleOfBlock, launches,
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

#[test]
fn digests_are_those_of_the_cpu() {
    on_devices(|device| {
        // Around the ends of stripes and pieces, and of what a block takes at once.
        for bytes in [248, 256, 320, 1016, 1024, 1032, 1080, 1088, 1096, 2048, 2056, 65_536, 65_544, 70_000] {
            let mut numbers = Numbers::new(60);
            let contents: Vec<u64> = (0..3 * bytes / 8).map(|_| numbers.bits()).collect();
            let on_device = Buffer::new(device, &contents);
            let seeds = [0, (7 << 32) | 3, u64::MAX];
            let granule = |index: usize| GranuleOfBlock {
                bytes: on_device.address().offset(index * bytes),
                seed: seeds[index],
                // The first and the last are of one block.
                sum: u32::from(index == 1),
                reserved: 0,
            };
            let granules = Buffer::new(device, &[granule(0), granule(1), granule(2)]);
            let before = [5_u64, u64::MAX];
            let sums = Buffer::new(device, &before);
            let parameters = DigestGranules {
                sums: sums.address(),
                granules: granules.address(),
                secret: DigestGranules::SECRET,
                bytes: bytes as u32,
                reserved: 0,
            };
            device.launch(&launches::digest_granules(3, &parameters)).expect("kernels run");
            let mut expected = before;
            for (index, granule) in bytemuck::cast_slice::<u64, u8>(&contents).chunks(bytes).enumerate() {
                let sum = &mut expected[usize::from(index == 1)];
                *sum = sum.wrapping_add(xxh3_64_with_seed(granule, seeds[index]));
            }
            assert_eq!(sums.read::<u64>(), expected, "{bytes} bytes");
        }
    });
}

#[test]
fn digests_of_samples_are_those_of_the_cpu() {
    on_devices(|device| {
        let mut numbers = Numbers::new(61);
        let contents: Vec<u64> = (0..4096 / 8).map(|_| numbers.bits()).collect();
        let on_device = Buffer::new(device, &contents);
        let bytes: &[u8] = bytemuck::cast_slice(&contents);
        // Anywhere, one twice, and in any order.
        let places = [[0, 64, 128, 192], [0, 1024, 1024, 4032], [4032, 8, 72, 2048]];
        let seeds = [0, (9 << 32) | 1, u64::MAX];
        let sample = |index: usize| SampleOfBlock {
            lines: places[index].map(|line| on_device.address().offset(line).0),
            seed: seeds[index],
            sum: u32::from(index == 1),
            reserved: 0,
        };
        let samples = Buffer::new(device, &[sample(0), sample(1), sample(2)]);
        let before = [5_u64, u64::MAX];
        let sums = Buffer::new(device, &before);
        let (secret, samples) = (DigestGranules::SECRET, samples.address());
        let parameters = DigestSamples { sums: sums.address(), samples, secret };
        device.launch(&launches::digest_samples(3, &parameters)).expect("kernels run");
        let mut expected = before;
        for (index, lines) in places.iter().enumerate() {
            let gathered: Vec<u8> = lines.iter().flat_map(|&line| bytes[line..line + 64].to_vec()).collect();
            let sum = &mut expected[usize::from(index == 1)];
            *sum = sum.wrapping_add(xxh3_64_with_seed(&gathered, seeds[index]));
        }
        assert_eq!(sums.read::<u64>(), expected);
    });
}

#[test]
fn what_is_hashed_in_another_way_is_refused() {
    for bytes in [0, 240, 247, 252] {
        let parameters = DigestGranules {
            sums: DeviceAddress::NULL,
            granules: DeviceAddress::NULL,
            secret: DigestGranules::SECRET,
            bytes,
            reserved: 0,
        };
        let refused = std::panic::catch_unwind(|| launches::digest_granules(1, &parameters));
        assert!(refused.is_err(), "{bytes} bytes");
    }
}
