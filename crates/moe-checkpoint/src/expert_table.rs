//! Tables of the experts of every token of the vocabulary, for layers that do not choose them by scores.

use safetensors::Dtype;

use crate::family::{LayerRole, Role};
use crate::{Checkpoint, Error, Result};

/// Which experts every token of the vocabulary goes to in a layer that routes by a table (hash layers,
/// arXiv 2106.04426). Scores give their weights alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertTable {
    top_k: usize,
    experts: Vec<u32>,
}

impl ExpertTable {
    /// Rows `[V, k]` of numbers below `experts`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for an expert that does not exist, and one that a token would go to twice; `what` names
    /// the table.
    pub fn new(what: &str, top_k: usize, experts: usize, rows: Vec<u32>) -> Result<Self> {
        for (token, row) in rows.chunks(top_k.max(1)).enumerate() {
            let twice = row.iter().enumerate().any(|(slot, expert)| row[..slot].contains(expert));
            if twice || row.iter().any(|expert| *expert as usize >= experts) || row.len() != top_k {
                return Err(Error::OutOfRange {
                    what: format!("experts of token {token} in {what}"),
                    found: format!("{row:?}"),
                    expected: format!("{top_k} different ones of {experts}"),
                });
            }
        }
        Ok(Self { top_k, experts: rows })
    }

    /// Experts of a token, k.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Tokens of the vocabulary, V.
    pub fn tokens(&self) -> usize {
        self.experts.len() / self.top_k.max(1)
    }

    /// The experts of a token `[k]`; none of one past the vocabulary.
    pub fn row(&self, token: usize) -> &[u32] {
        self.experts.get(token * self.top_k..(token + 1) * self.top_k).unwrap_or_default()
    }

    /// The experts of a token where only `left` (ascending) are left and a token goes to at most `top_k`: those of its
    /// own that are left, in their order, then as many of the others as are missing, counted from the one whose place
    /// among those left is the token modulo their number. So the tokens of a removed expert spread over all that are
    /// left, and no other token changes.
    pub fn row_without(&self, token: usize, left: &[u32], top_k: usize) -> Vec<u32> {
        let k = top_k.min(self.top_k).min(left.len());
        let own = self.row(token).iter().copied().filter(|expert| left.binary_search(expert).is_ok());
        let mut row: Vec<u32> = own.take(k).collect();
        let mut others = left.iter().cycle().skip(token % left.len().max(1));
        while row.len() < k {
            match others.next() {
                Some(expert) if !row.contains(expert) => row.push(*expert),
                Some(_) => {}
                None => break,
            }
        }
        row
    }

    /// The table of a model in which only `left` (ascending) are left, numbered as they are there, and a token goes to
    /// at most `top_k`.
    pub fn without(&self, left: &[u32], top_k: usize) -> Self {
        let top_k = top_k.min(self.top_k).min(left.len());
        let number = |expert: u32| left.partition_point(|other| *other < expert) as u32;
        let rows = (0..self.tokens()).flat_map(|token| self.row_without(token, left, top_k));
        Self { top_k, experts: rows.map(number).collect() }
    }

    /// Its bytes in files `[V, k]`, as I64 or I32.
    pub fn to_bytes(&self, dtype: Dtype) -> Vec<u8> {
        match dtype {
            Dtype::I32 => self.experts.iter().flat_map(|expert| (*expert as i32).to_le_bytes()).collect(),
            _ => self.experts.iter().flat_map(|expert| i64::from(*expert).to_le_bytes()).collect(),
        }
    }
}

impl Checkpoint {
    /// The table that a layer routes by; `None` of a layer that chooses experts by their scores.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a table that names an expert that does not exist, or one twice for a token. Those of
    /// reading it.
    pub fn expert_table(&self, layer: usize) -> Result<Option<ExpertTable>> {
        let Some(moe) = self.config().moe(layer).filter(|moe| moe.by_table) else { return Ok(None) };
        let info = self.role(Role::Layer(layer, LayerRole::ExpertTable))?;
        let bytes = self.bytes(&info.name)?;
        // A negative number becomes one that no expert has.
        let number = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        let rows = match info.dtype {
            Dtype::I32 => {
                bytes.as_chunks::<4>().0.iter().map(|bytes| number(i32::from_le_bytes(*bytes).into())).collect()
            }
            _ => bytes.as_chunks::<8>().0.iter().map(|bytes| number(i64::from_le_bytes(*bytes))).collect(),
        };
        let table = ExpertTable::new(&format!("tensor `{}`", info.name), info.shape[1], moe.num_experts(), rows)?;
        self.release_tensor(&info.name)?;
        Ok(Some(table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_a_removed_expert_go_to_others_and_the_rest_stay() {
        let table = ExpertTable::new("a table", 2, 5, vec![0, 1, 4, 2, 3, 0, 1, 2, 2, 1]).unwrap();
        assert_eq!((table.tokens(), table.row(1), table.row(9)), (5, &[4, 2][..], &[][..]));
        let left = [0, 2, 4];
        let rows: Vec<Vec<u32>> = (0..5).map(|token| table.row_without(token, &left, 2)).collect();
        // Token 3 takes the first of those left, token 4 would take the second, which it has, and takes the third.
        assert_eq!(rows, [vec![0, 2], vec![4, 2], vec![0, 4], vec![2, 0], vec![2, 4]]);
        let pruned = table.without(&left, 2);
        assert_eq!(pruned, ExpertTable::new("it", 2, 3, vec![0, 1, 2, 1, 0, 2, 1, 0, 1, 2]).unwrap());
        assert_eq!(table.without(&[0, 1, 2, 3, 4], 2), table);
        assert_eq!(table.without(&[3], 2).row(2), [0]);
        assert_eq!(table.row_without(0, &[0, 1, 2], 1), [0]);
        assert_eq!(pruned.to_bytes(Dtype::I32)[8..12], 2i32.to_le_bytes());
        assert_eq!(pruned.to_bytes(Dtype::I64)[16..24], 2i64.to_le_bytes());
    }

    #[test]
    fn a_table_with_experts_that_are_not_there_is_refused_by_its_token() {
        let error = ExpertTable::new("a table", 2, 5, vec![0, 1, 5, 2]).unwrap_err().to_string();
        assert!(error.contains("token 1 in a table") && error.contains("[5, 2]"), "{error}");
        assert!(ExpertTable::new("a table", 2, 5, vec![3, 3]).is_err());
    }
}
