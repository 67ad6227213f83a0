//! Some of the tokens that an MoE layer saw.

/// Tokens of one MoE layer: what its router and experts read, and how they were routed. `S` tokens, of all tokens
/// whether routed to an expert or not.
///
/// With the weights, everything that merging fits on calibration data follows from it: unit activations, expert
/// outputs, the Gram matrices of least squares. A method sees as much of the data as was sampled, up to all of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenSample {
    /// Inputs of router and experts `[S, H]`.
    pub inputs: Vec<f32>,
    /// Router logits `[S, E]`.
    pub logits: Vec<f32>,
    /// Selected experts `[S, k]`.
    pub selected: Vec<u32>,
    /// Their routing weights as applied `[S, k]`.
    pub weights: Vec<f32>,
    /// Hidden size, H.
    pub hidden: usize,
    /// Experts, E.
    pub experts: usize,
    /// Experts per token, k.
    pub top_k: usize,
}

/// Numbers that order the rows of a sample in statistics: the hash of a token in four parts of 16 bits, its wave in
/// four, its place in the wave in two.
pub(crate) const KEY: usize = 10;

/// Name of the sample of a layer in statistics: rows of key, input `[H]`, logits `[E]`, selected experts `[k]` and
/// weights `[k]`.
pub(crate) fn sample_name(layer: usize) -> String {
    format!("sample.{layer}")
}

/// Numbers of a row.
pub(crate) fn columns(hidden: usize, experts: usize, top_k: usize) -> usize {
    KEY + hidden + experts + 2 * top_k
}

impl TokenSample {
    /// The sample that rows of statistics hold, in the order of the tokens.
    pub(crate) fn from_rows(rows: &[f64], columns: usize, hidden: usize, experts: usize) -> Option<Self> {
        let top_k = columns.checked_sub(KEY + hidden + experts).filter(|slots| slots % 2 == 0)? / 2;
        let mut rows: Vec<&[f64]> = rows.chunks_exact(columns).collect();
        let identity = |row: &[f64]| row[4..KEY].iter().map(|part| *part as u64).collect::<Vec<_>>();
        rows.sort_by_key(|row| identity(row));
        let mut sample = Self { hidden, experts, top_k, ..Self::default() };
        for row in rows {
            let (input, routing) = row[KEY..].split_at(hidden);
            let (logits, slots) = routing.split_at(experts);
            let (selected, weights) = slots.split_at(top_k);
            let floats = |values: &[f64]| values.iter().map(|v| *v as f32).collect::<Vec<_>>();
            sample.inputs.extend(floats(input));
            sample.logits.extend(floats(logits));
            sample.selected.extend(selected.iter().map(|e| *e as u32));
            sample.weights.extend(floats(weights));
        }
        Some(sample)
    }

    /// Number of tokens, S.
    pub fn tokens(&self) -> usize {
        self.inputs.len() / self.hidden.max(1)
    }

    /// Routing weight of every token at an expert; 0 where it is not routed there. `[S]`.
    pub fn weights_of(&self, expert: usize) -> Vec<f32> {
        let rows = self.selected.chunks_exact(self.top_k.max(1)).zip(self.weights.chunks_exact(self.top_k.max(1)));
        let weight = |(selected, weights): (&[u32], &[f32])| {
            selected.iter().zip(weights).filter(|(e, _)| **e as usize == expert).map(|(_, w)| w).sum()
        };
        rows.map(weight).collect()
    }

    /// Softmax probability of an expert among all, for every token `[S]`.
    pub fn probabilities_of(&self, expert: usize) -> Vec<f32> {
        let probability = |logits: &[f32]| {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|z| f64::from(z - largest).exp()).sum();
            (f64::from(logits[expert] - largest).exp() / sum) as f32
        };
        self.logits.chunks_exact(self.experts.max(1)).map(probability).collect()
    }

    /// The sample with its experts renamed: expert `e` becomes `to[e]`.
    pub fn renamed(&self, to: &[u32]) -> Self {
        let mut renamed = self.clone();
        renamed.selected.iter_mut().for_each(|e| *e = to[*e as usize]);
        for (into, from) in renamed.logits.chunks_exact_mut(self.experts).zip(self.logits.chunks_exact(self.experts)) {
            from.iter().zip(to).for_each(|(z, to)| into[*to as usize] = *z);
        }
        renamed
    }

    pub(super) fn validate(&self, experts: usize, hidden: usize) -> Result<(), String> {
        if (self.hidden, self.experts) != (hidden, experts) {
            return Err(format!(
                "a sample of hidden size {} and {} experts, expected {hidden} and {experts}",
                self.hidden, self.experts
            ));
        }
        let tokens = self.tokens();
        for (what, found, expected) in [
            ("inputs", self.inputs.len(), tokens * hidden),
            ("logits", self.logits.len(), tokens * experts),
            ("selected experts", self.selected.len(), tokens * self.top_k),
            ("weights", self.weights.len(), tokens * self.top_k),
        ] {
            if found != expected {
                return Err(format!("{found} {what} of {tokens} sampled tokens, expected {expected}"));
            }
        }
        if let Some(expert) = self.selected.iter().find(|e| **e as usize >= experts) {
            return Err(format!("a sampled token is routed to expert {expert} of {experts}"));
        }
        let finite = self.inputs.iter().chain(&self.weights).all(|v| v.is_finite());
        match finite {
            true => Ok(()),
            false => Err("a sampled input or weight is not finite".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_probabilities_are_per_token() {
        let sample = TokenSample {
            inputs: vec![0.0; 4],
            logits: vec![0.0, 0.0, 1.0, 1.0, 0.0, 0.0],
            selected: vec![2, 0, 0, 1],
            weights: vec![0.75, 0.25, 0.5, 0.5],
            hidden: 2,
            experts: 3,
            top_k: 2,
        };
        sample.validate(3, 2).unwrap();
        assert_eq!(sample.weights_of(0), [0.25, 0.5]);
        assert_eq!(sample.weights_of(2), [0.75, 0.0]);
        let e = 1f32.exp();
        assert!((sample.probabilities_of(2)[0] - e / (2.0 + e)).abs() < 1e-6);
        let renamed = sample.renamed(&[1, 2, 0]);
        assert_eq!((renamed.weights_of(1), renamed.weights_of(0)), (vec![0.25, 0.5], vec![0.75, 0.0]));
        assert_eq!(renamed.probabilities_of(0), sample.probabilities_of(2));
        assert!(sample.validate(4, 2).unwrap_err().contains("4"));
    }
}
