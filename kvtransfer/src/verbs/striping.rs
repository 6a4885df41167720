//! Which path takes the next piece, and how long pieces are.

/// A path as the choice sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PathLoad {
    /// Whether it works, has a free place in its queue, and its window admits the piece.
    pub(crate) has_room: bool,
    /// Bytes under way.
    pub(crate) in_flight: u64,
    /// Bytes per second, once known.
    pub(crate) rate: Option<f64>,
}

/// The path on which a piece of `len` bytes would be through first; of equals the first. `None` when all are full.
pub(crate) fn choose_path(paths: &[PathLoad], len: u64) -> Option<usize> {
    // A path of unknown speed is taken to be as fast as the fastest, so that it is tried.
    let fastest = paths.iter().filter_map(|path| path.rate).reduce(f64::max).unwrap_or(1.0);
    let through_at = |path: &PathLoad| (path.in_flight + len) as f64 / path.rate.unwrap_or(fastest).max(1.0);
    let open = paths.iter().enumerate().filter(|(_, path)| path.has_room);
    open.min_by(|(_, one), (_, other)| through_at(one).total_cmp(&through_at(other))).map(|(index, _)| index)
}

/// Length of the pieces of a write of `len` bytes over `paths` paths: short enough for all of them to share it, but
/// not so short that the cost of a piece shows.
pub(crate) fn piece_len(len: usize, paths: usize) -> usize {
    len.div_ceil(paths.max(1)).next_multiple_of(ALIGNMENT).clamp(SHORTEST, LONGEST)
}

/// Below this, the cost of one more request shows (docs/performance.md).
const SHORTEST: usize = 64 << 10;
/// One longer piece would hold up those of others.
pub(crate) const LONGEST: usize = 1 << 20;
/// Pieces begin where pages do, as far as the write itself does.
const ALIGNMENT: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_that_is_through_first() {
        let path = |has_room, in_flight, rate: f64| PathLoad {
            has_room,
            in_flight,
            rate: (0.0 < rate).then_some(rate),
        };
        #[rustfmt::skip]
        let rows = [
            ("the first of equals",               vec![path(true, 0, 1e9), path(true, 0, 1e9)],       Some(0)),
            ("the one with less under way",       vec![path(true, 9000, 1e9), path(true, 100, 1e9)],  Some(1)),
            ("the faster one, up to a point",     vec![path(true, 1000, 4e9), path(true, 0, 1e9)],    Some(0)),
            ("and not beyond",                    vec![path(true, 9000, 4e9), path(true, 0, 1e9)],    Some(1)),
            ("not a full one",                    vec![path(false, 0, 1e9), path(true, 9000, 1e9)],   Some(1)),
            ("one of unknown speed is tried",     vec![path(true, 10, 1e9), path(true, 0, 0.0)],      Some(1)),
            ("none when all are full",            vec![path(false, 0, 1e9)],                          None),
            ("none when there is none",           vec![],                                             None),
        ];
        for (name, paths, expected) in rows {
            assert_eq!(choose_path(&paths, 1000), expected, "{name}");
        }
    }

    #[test]
    fn pieces() {
        #[rustfmt::skip]
        let rows = [
            ("one path takes it whole",        900_000,  1, 901_120),
            ("up to a bound",                  3 << 20,  1, 1 << 20),
            ("two paths share",                1 << 20,  2, 512 << 10),
            ("in whole pages",                 300_000,  2, 151_552),
            ("but not crumbs",                 70_000,   4, 64 << 10),
            ("nothing is divided by no path",  1000,     0, 64 << 10),
        ];
        for (name, len, paths, expected) in rows {
            assert_eq!(piece_len(len, paths), expected, "{name}");
        }
    }
}
