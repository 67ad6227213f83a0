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
    }
}
