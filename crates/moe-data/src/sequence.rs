//! One tokenized sequence.

/// Token ids of one sequence and which of them count in the loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids `[length]`.
    pub ids: Vec<u32>,
    /// `[length]`: whether predicting `ids[t]` counts in the loss; `None` means every token does. Position 0 has
    /// nothing before it, so it is never predicted, whatever stands there.
    pub loss: Option<Vec<bool>>,
}

impl Sequence {
    /// Tokens a sequence must have for anything to be predicted: one to predict, one to predict it from.
    pub const MIN_LEN: usize = 2;

    /// A sequence of which every token counts in the loss.
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids, loss: None }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Whether predicting `ids[position]` counts in the loss; false at position 0 and past the end.
    pub fn counts(&self, position: usize) -> bool {
        position > 0
            && position < self.ids.len()
            && self.loss.as_ref().is_none_or(|mask| mask.get(position).copied().unwrap_or(false))
    }

    /// What stands before the first token that counts in the loss, and the tokens from there on that do: a prompt and
    /// its answer. `None` where every token counts, or where one of the two is empty.
    pub fn prompt_and_answer(&self) -> Option<(&[u32], &[u32])> {
        self.loss.as_ref()?;
        let start = (1..self.ids.len()).find(|t| self.counts(*t))?;
        let end = (start..self.ids.len()).find(|t| !self.counts(*t)).unwrap_or(self.ids.len());
        Some((&self.ids[..start], &self.ids[start..end]))
    }

    /// Number of predicted tokens that count in the loss: the denominator of a mean over the sequence.
    pub fn loss_tokens(&self) -> usize {
        match &self.loss {
            None => self.ids.len().saturating_sub(1),
            Some(mask) => mask.iter().take(self.ids.len()).skip(1).filter(|counts| **counts).count(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_is_never_predicted() {
        let all = Sequence::new(vec![5, 6, 7]);
        assert_eq!((all.len(), all.loss_tokens()), (3, 2));
        assert_eq!([0, 1, 2, 3].map(|t| all.counts(t)), [false, true, true, false]);
        let masked = Sequence { ids: vec![5, 6, 7], loss: Some(vec![true, false, true]) };
        assert_eq!(masked.loss_tokens(), 1);
        assert_eq!([0, 1, 2].map(|t| masked.counts(t)), [false, false, true]);
        assert_eq!(Sequence::new(vec![]).loss_tokens(), 0);
        assert_eq!(masked.prompt_and_answer(), Some((&[5, 6][..], &[7][..])));
        let two = Sequence { ids: vec![5, 6, 7, 8], loss: Some(vec![false, true, true, false]) };
        assert_eq!(two.prompt_and_answer(), Some((&[5][..], &[6, 7][..])));
        assert_eq!(all.prompt_and_answer(), None);
    }
}
