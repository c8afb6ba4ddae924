//! Pieces of a file gathered until advice about them is worth a call to the system.

use std::ops::Range;

/// Bytes that one advice is about. A call for each MiB cost as much as a tenth of the copy.
const BATCH_BYTES: u64 = 8 << 20;

/// Neighbouring pieces that were read or written.
#[derive(Debug, Default)]
pub struct Batch {
    /// Holds all pieces.
    range: Range<u64>,
    bytes: u64,
}

impl Batch {
    /// Adds a piece; returns a range when enough has come together, or when the piece lies far from the others (these
    /// are then returned without it).
    pub fn add(&mut self, piece: Range<u64>) -> Option<Range<u64>> {
        let is_far = piece.start > self.range.end.saturating_add(BATCH_BYTES)
            || piece.end.saturating_add(BATCH_BYTES) < self.range.start;
        if self.bytes > 0 && is_far {
            let before = self.range.clone();
            self.bytes = piece.end - piece.start;
            self.range = piece;
            return Some(before);
        }
        self.range = if self.bytes == 0 {
            piece.clone()
        } else {
            self.range.start.min(piece.start)..self.range.end.max(piece.end)
        };
        self.bytes += piece.end - piece.start;
        if self.bytes < BATCH_BYTES {
            return None;
        }
        self.bytes = 0;
        Some(self.range.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn neighbours_in_any_order_become_one_range() {
        let mut batch = Batch::default();
        assert_eq!(batch.add(3 * MIB..6 * MIB), None);
        assert_eq!(batch.add(0..3 * MIB), None);
        assert_eq!(batch.add(6 * MIB..8 * MIB), Some(0..8 * MIB));
        assert_eq!(batch.add(8 * MIB..9 * MIB), None);
    }

    #[test]
    fn a_far_piece_starts_anew() {
        let mut batch = Batch::default();
        assert_eq!(batch.add(100 * MIB..101 * MIB), None);
        assert_eq!(batch.add(0..MIB), Some(100 * MIB..101 * MIB));
        assert_eq!(batch.add(MIB..9 * MIB), Some(0..9 * MIB));
    }
}
