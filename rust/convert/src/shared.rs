//! Factors that many tensors take some columns of each (the experts of one layer): read once, kept for the next tensor.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use fastft_checkpoint::Result;

use crate::job::Place;

/// A layer needs three (gate, up, down); one more for the layer that begins.
const MAX_KEPT: usize = 4;
/// Beyond it only the newest is kept.
const MAX_KEPT_VALUES: usize = 32 * 1024 * 1024;

/// The factors used last.
#[derive(Debug, Default)]
pub struct SharedFactors {
    kept: Mutex<VecDeque<(Place, Arc<Vec<f32>>)>>,
}

impl SharedFactors {
    /// The values at `place`, from `read` unless they are kept. The lock is held meanwhile: no factor is read twice.
    pub fn get(&self, place: Place, read: impl FnOnce() -> Result<Vec<f32>>) -> Result<Arc<Vec<f32>>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = kept.iter().position(|(known, _)| *known == place)
            && let Some(found) = kept.remove(index)
        {
            let values = Arc::clone(&found.1);
            kept.push_back(found);
            return Ok(values);
        }
        let values = Arc::new(read()?);
        kept.push_back((place, Arc::clone(&values)));
        while kept.len() > 1
            && (kept.len() > MAX_KEPT || kept.iter().map(|(_, values)| values.len()).sum::<usize>() > MAX_KEPT_VALUES)
        {
            kept.pop_front();
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_KEPT, SharedFactors};
    use crate::job::Place;

    fn place(offset: u64) -> Place {
        Place { input: 0, offset }
    }

    #[test]
    fn a_factor_in_use_is_read_once_and_an_old_one_again() {
        let shared = SharedFactors::default();
        let mut reads = 0;
        let mut get = |offset: u64| {
            let got = shared.get(place(offset), || {
                reads += 1;
                Ok(vec![1.0; 8])
            });
            assert!(got.is_ok());
        };
        for _ in 0..3 {
            get(0);
            get(32);
        }
        for number in 2..=MAX_KEPT as u64 + 1 {
            get(number * 32);
        }
        get(0);
        assert_eq!(reads, 2 + MAX_KEPT + 1);
    }

    #[test]
    fn a_failed_read_is_tried_again() {
        let shared = SharedFactors::default();
        let failed = shared.get(place(0), || Err(fastft_checkpoint::Error::Plan("no".to_owned())));
        assert!(failed.is_err());
        assert!(shared.get(place(0), || Ok(vec![2.0])).is_ok_and(|values| *values == [2.0]));
    }
}
