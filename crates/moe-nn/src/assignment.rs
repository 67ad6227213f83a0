//! Which experts each token goes to, and the order in which experts then see their tokens.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// The experts of each token: `slots` places per token, each an expert or empty.
///
/// It lives on the host: the numbers are few, every backend then breaks ties alike (the lower index first), and sizes
/// of segments have to be known there anyway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    tokens: usize,
    slots: usize,
    experts: Vec<u32>,
}

impl Assignment {
    /// An empty place: nothing runs, and nothing is added.
    pub const NONE: u32 = u32::MAX;

    /// An assignment from its places, token by token.
    ///
    /// # Panics
    ///
    /// If there are not `slots` places per token.
    pub fn new(tokens: usize, slots: usize, experts: Vec<u32>) -> Self {
        assert_eq!(experts.len(), tokens * slots, "{tokens} tokens of {slots} slots, but {} experts", experts.len());
        Assignment { tokens, slots, experts }
    }

    /// An assignment from the experts of each token, which may be of different numbers.
    pub fn from_lists(lists: &[Vec<u32>]) -> Self {
        let slots = lists.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let pad = |list: &Vec<u32>| (0..slots).map(|i| list.get(i).copied().unwrap_or(Self::NONE)).collect::<Vec<_>>();
        Assignment { tokens: lists.len(), slots, experts: lists.iter().flat_map(pad).collect() }
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The number of places per token.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// The places of one token, best first.
    pub fn token(&self, token: usize) -> &[u32] {
        &self.experts[token * self.slots..(token + 1) * self.slots]
    }

    /// How many tokens each of `num_experts` experts has.
    pub fn loads(&self, num_experts: usize) -> Vec<usize> {
        let mut loads = vec![0; num_experts];
        self.experts.iter().filter(|&&expert| expert != Self::NONE).for_each(|&expert| loads[expert as usize] += 1);
        loads
    }

    /// The number of places that are not empty.
    pub fn filled(&self) -> usize {
        self.experts.iter().filter(|&&expert| expert != Self::NONE).count()
    }

    /// The experts as a tensor of indices `[tokens, slots]`, with 0 in empty places.
    pub fn indices(&self, device: &Device) -> Tensor<2, Int> {
        let indices = self.experts.iter().map(|&expert| if expert == Self::NONE { 0 } else { i64::from(expert) });
        Tensor::from_data(TensorData::new(indices.collect::<Vec<i64>>(), [self.tokens, self.slots]), device)
    }

    /// 1 in places that are filled and 0 in empty ones, `[tokens, slots]`.
    pub fn mask(&self, device: &Device) -> Tensor<2> {
        let mask = self.experts.iter().map(|&expert| f32::from(expert != Self::NONE));
        Tensor::from_data(TensorData::new(mask.collect::<Vec<f32>>(), [self.tokens, self.slots]), device)
    }

    /// This assignment with at most `capacity` tokens per expert. Whoever has the highest priority stays; among equals,
    /// the first token. `priority` has a value per place, as the weights of a routing have.
    ///
    /// # Panics
    ///
    /// If there is not one priority per place.
    pub fn limited(&self, num_experts: usize, capacity: usize, priority: &[f32]) -> Self {
        assert_eq!(priority.len(), self.experts.len(), "one priority per place");
        let mut order: Vec<usize> = (0..self.experts.len()).collect();
        order.sort_by(|&a, &b| priority[b].total_cmp(&priority[a]).then(a.cmp(&b)));
        let (mut loads, mut experts) = (vec![0; num_experts], self.experts.clone());
        for place in order {
            if experts[place] == Self::NONE {
                continue;
            }
            let load = &mut loads[experts[place] as usize];
            if *load == capacity {
                experts[place] = Self::NONE;
            } else {
                *load += 1;
            }
        }
        Assignment { experts, ..*self }
    }
}

/// The filled places of an assignment, sorted by expert and then by token.
#[derive(Clone, Debug)]
pub struct Segments {
    offsets: Vec<usize>,
    places: Vec<u32>,
    slots: usize,
}

impl Segments {
    /// Sorts the places of an assignment over `num_experts` experts.
    pub fn of(assignment: &Assignment, num_experts: usize) -> Self {
        let mut offsets = vec![0];
        for load in assignment.loads(num_experts) {
            offsets.push(offsets[offsets.len() - 1] + load);
        }
        let (mut next, mut places) = (offsets.clone(), vec![0; offsets[num_experts]]);
        for (place, &expert) in assignment.experts.iter().enumerate() {
            if expert != Assignment::NONE {
                places[next[expert as usize]] = place as u32;
                next[expert as usize] += 1;
            }
        }
        Segments { offsets, places, slots: assignment.slots }
    }

    /// `rows` rows for each of `num_experts` experts, which come from no assignment.
    pub fn even(num_experts: usize, rows: usize) -> Self {
        let places = (0..(num_experts * rows) as u32).collect();
        Segments { offsets: (0..=num_experts).map(|expert| expert * rows).collect(), places, slots: 1 }
    }

    /// Where the rows of each expert begin, and last where they end: experts + 1 numbers.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The number of experts.
    pub fn num_experts(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The number of rows of all experts.
    pub fn rows(&self) -> usize {
        self.places.len()
    }

    fn ints(values: impl Iterator<Item = i64>, device: &Device) -> Tensor<1, Int> {
        let values: Vec<i64> = values.collect();
        let count = values.len();
        Tensor::from_data(TensorData::new(values, [count]), device)
    }

    /// The token of each row, `[rows]`.
    pub fn tokens(&self, device: &Device) -> Tensor<1, Int> {
        Self::ints(self.places.iter().map(|&place| i64::from(place) / self.slots as i64), device)
    }

    /// The place (token x slots + slot) of each row, `[rows]`.
    pub fn places(&self, device: &Device) -> Tensor<1, Int> {
        Self::ints(self.places.iter().map(|&place| i64::from(place)), device)
    }

    /// The expert of each row, `[rows]`.
    pub fn experts(&self, device: &Device) -> Tensor<1, Int> {
        let experts =
            (0..self.num_experts()).flat_map(|e| std::iter::repeat_n(e as i64, self.offsets[e + 1] - self.offsets[e]));
        Self::ints(experts, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_expert_keeps_the_tokens_that_want_it_most() {
        let assignment = Assignment::new(3, 2, vec![0, 1, 0, Assignment::NONE, 0, 1]);
        let limited = assignment.limited(2, 1, &[0.3, 0.7, 0.9, 0.0, 0.9, 0.7]);
        let none = Assignment::NONE;
        assert_eq!(limited, Assignment::new(3, 2, vec![none, 1, 0, none, none, none]));
        assert_eq!((limited.loads(2), limited.filled()), (vec![1, 1], 2));
    }

    #[test]
    fn rows_are_sorted_by_expert_then_by_token() {
        let assignment = Assignment::from_lists(&[vec![2, 0], vec![], vec![2]]);
        let segments = Segments::of(&assignment, 4);
        assert_eq!(segments.offsets(), [0, 1, 1, 3, 3]);
        let device = Device::default();
        assert_eq!(segments.tokens(&device).try_to_vec_as::<i64>().unwrap(), [0, 0, 2]);
        assert_eq!(segments.experts(&device).try_to_vec_as::<i64>().unwrap(), [0, 2, 2]);
        assert_eq!(segments.places(&device).try_to_vec_as::<i64>().unwrap(), [1, 0, 4]);
    }
}
