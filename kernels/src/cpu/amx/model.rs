//! The tile instructions in plain loops, as the manual defines them (Intel SDM, volume 2: TDPBF16PS, TDPBSSD).

use super::{TILE_ROWS, TILE_UNITS, Tile, Tiles};

/// Eight tile registers.
pub(crate) struct ModelTiles([Tile; 8]);

impl ModelTiles {
    /// Registers in any state: what is read before it is written shows up as NaN.
    pub(crate) const fn new() -> Self {
        Self([[[u32::MAX; TILE_UNITS]; TILE_ROWS]; 8])
    }
}

impl Tiles for ModelTiles {
    fn zero<const TILE: u8>(&mut self) {
        self.0[usize::from(TILE)] = [[0; TILE_UNITS]; TILE_ROWS];
    }

    fn load<const TILE: u8>(&mut self, from: &Tile) {
        self.0[usize::from(TILE)] = *from;
    }

    fn store<const TILE: u8>(&mut self, to: &mut Tile) {
        *to = self.0[usize::from(TILE)];
    }

    fn add_bf16<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        let (a, b) = (self.0[usize::from(A)], self.0[usize::from(B)]);
        for (sums, a) in self.0[usize::from(SUM)].iter_mut().zip(&a) {
            for (output, sum) in sums.iter_mut().enumerate() {
                // Even and odd inputs have sums of their own, which meet in the end.
                let mut halves = [0.0f32; 2];
                for (a, b) in a.iter().zip(&b) {
                    for (half, (a, b)) in halves.iter_mut().zip(pair(*a).into_iter().zip(pair(b[output]))) {
                        *half = flushed(a.mul_add(b, *half));
                    }
                }
                let both = flushed(halves[0] + halves[1]);
                *sum = flushed(flushed(f32::from_bits(*sum)) + both).to_bits();
            }
        }
    }

    fn add_int8<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        let (a, b) = (self.0[usize::from(A)], self.0[usize::from(B)]);
        for (sums, a) in self.0[usize::from(SUM)].iter_mut().zip(&a) {
            for (output, sum) in sums.iter_mut().enumerate() {
                for (a, b) in a.iter().zip(&b) {
                    for (a, b) in a.to_le_bytes().into_iter().zip(b[output].to_le_bytes()) {
                        let product = i32::from(a.cast_signed()) * i32::from(b.cast_signed());
                        *sum = sum.wrapping_add_signed(product);
                    }
                }
            }
        }
    }
}

/// Two bf16 as f32; subnormal numbers count as zero.
fn pair(unit: u32) -> [f32; 2] {
    [f32::from_bits(unit << 16), f32::from_bits(unit & 0xffff_0000)].map(flushed)
}

/// Numbers below the normal range are zero of their sign.
fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0.0f32.copysign(value) } else { value }
}

#[test]
fn products_of_tiles_by_hand() {
    let mut tiles = ModelTiles::new();
    let (mut a, mut b) = ([[0; 16]; 16], [[0; 16]; 16]);
    let halves = |first: f32, second: f32| (first.to_bits() >> 16) | (second.to_bits() & 0xffff_0000);
    (a[1][0], a[1][15]) = (halves(2.0, 3.0), halves(0.5, 0.0));
    (b[0][2], b[15][2]) = (halves(10.0, 100.0), halves(4.0, 7.0));
    tiles.load::<1>(&a);
    tiles.load::<2>(&b);
    tiles.zero::<0>();
    tiles.add_bf16::<0, 1, 2>();
    tiles.add_bf16::<0, 1, 2>();
    let mut sums = [[7; 16]; 16];
    tiles.store::<0>(&mut sums);
    assert_eq!(f32::from_bits(sums[1][2]), 2.0 * 322.0, "2 * 10 + 3 * 100 + 0.5 * 4, twice");
    assert_eq!(sums.as_flattened().iter().filter(|sum| **sum != 0).count(), 1);

    let bytes = |bytes: [i8; 4]| u32::from_le_bytes(bytes.map(i8::cast_unsigned));
    (a[1][0], a[1][15]) = (bytes([-128, 127, 1, 0]), bytes([0, 0, 0, -3]));
    (b[0][2], b[15][2]) = (bytes([-128, 127, -1, 9]), bytes([9, 9, 9, 5]));
    tiles.load::<1>(&a);
    tiles.load::<2>(&b);
    tiles.zero::<0>();
    tiles.add_int8::<0, 1, 2>();
    tiles.store::<0>(&mut sums);
    assert_eq!(sums[1][2].cast_signed(), 128 * 128 + 127 * 127 - 1 - 15);
    assert_eq!(sums.as_flattened().iter().filter(|sum| **sum != 0).count(), 1);
}
