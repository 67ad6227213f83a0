//! The keys that queries see, where not all before them.

use std::ops::Range;

/// The keys that every query sees of those up to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Positions in the sequence of the query, ascending, query after query.
    keys: Vec<u32>,
    /// Where those of each query begin, and the end. None are listed for a query that sees all.
    starts: Vec<usize>,
}

impl Selection {
    /// From the ascending positions of the keys of every query; none for a query that sees all.
    pub fn new(queries: impl IntoIterator<Item = Vec<u32>>) -> Self {
        let (mut keys, mut starts) = (Vec::new(), vec![0]);
        for mut query in queries {
            keys.append(&mut query);
            starts.push(keys.len());
        }
        Self { keys, starts }
    }

    /// The keys of the query in this row, ascending; nothing if it sees all.
    pub fn keys(&self, row: usize) -> Option<&[u32]> {
        let keys = &self.keys[self.starts[row]..self.starts[row + 1]];
        (!keys.is_empty()).then_some(keys)
    }

    /// That of some rows.
    pub fn part(&self, rows: &Range<usize>) -> Self {
        Self::new(rows.clone().map(|row| self.keys(row).unwrap_or_default().to_vec()))
    }
}
