//! Grouping tokens by the expert they go to.

use super::Routed;

/// The tokens of every expert, grouped: expert e owns `offsets[e]..offsets[e + 1]` of the other arrays.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    offsets: Vec<usize>,
    rows: Vec<u32>,
    slots: Vec<u32>,
    weights: Vec<f32>,
}

/// The tokens of one expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertRows<'a> {
    /// Token of each row, ascending.
    pub rows: &'a [u32],
    /// Where the routing weight of each row stands in [`Routed::weights`].
    pub slots: &'a [u32],
    /// Routing weight of each row.
    pub weights: &'a [f32],
}

impl Routed {
    /// Groups tokens by expert.
    pub fn dispatch(&self) -> Dispatch {
        self.dispatch_where(|_| true)
    }

    /// Groups tokens by expert, without the slots of [`weights`](Self::weights) that `keep` refuses.
    pub fn dispatch_where(&self, keep: impl Fn(usize) -> bool) -> Dispatch {
        let kept = || self.selected.iter().enumerate().filter(|(slot, _)| keep(*slot));
        let mut offsets = vec![0usize; self.experts + 1];
        for (_, &e) in kept() {
            offsets[e as usize + 1] += 1;
        }
        for e in 0..self.experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let n = offsets[self.experts];
        let (mut rows, mut slots, mut weights) = (vec![0u32; n], vec![0u32; n], vec![0.0f32; n]);
        for (slot, &e) in kept() {
            let at = next[e as usize];
            next[e as usize] += 1;
            rows[at] = (slot / self.top_k) as u32;
            slots[at] = slot as u32;
            weights[at] = self.weights[slot];
        }
        Dispatch { offsets, rows, slots, weights }
    }
}

impl Dispatch {
    /// Tokens of expert `e`.
    pub fn expert(&self, e: usize) -> ExpertRows<'_> {
        let range = self.offsets[e]..self.offsets[e + 1];
        ExpertRows { rows: &self.rows[range.clone()], slots: &self.slots[range.clone()], weights: &self.weights[range] }
    }

    /// Most tokens any expert has.
    pub fn largest(&self) -> usize {
        self.offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dispatch_covers_every_slot_once() {
        let selected: Vec<u32> = (0..20).map(|i| if i % 2 == 0 { i * 7 % 3 } else { 3 + i * 5 % 3 }).collect();
        let weights = (0..20).map(|i| i as f32).collect();
        let routed = Routed { experts: 6, top_k: 2, selected, weights };
        let dispatch = routed.dispatch();
        let mut seen = [false; 20];
        for e in 0..6 {
            let rows = dispatch.expert(e);
            assert!(rows.rows.is_sorted());
            for ((&slot, &row), &w) in rows.slots.iter().zip(rows.rows).zip(rows.weights) {
                assert_eq!(routed.selected[slot as usize], e as u32);
                assert_eq!(row as usize, slot as usize / 2);
                assert_eq!(w, routed.weights[slot as usize]);
                assert!(!std::mem::replace(&mut seen[slot as usize], true));
            }
        }
        assert!(seen.into_iter().all(|s| s));
    }

    #[test]
    fn slots_can_be_left_out() {
        let routed = Routed { experts: 3, top_k: 2, selected: vec![2, 0, 0, 1], weights: vec![0.5, 0.0, 0.7, 0.3] };
        let dispatch = routed.dispatch_where(|slot| routed.weights[slot] != 0.0);
        assert_eq!(dispatch.expert(0), ExpertRows { rows: &[1], slots: &[2], weights: &[0.7] });
        assert_eq!((dispatch.expert(1).rows, dispatch.expert(2).rows), (&[1u32][..], &[0u32][..]));
        assert_eq!(dispatch.largest(), 1);
    }
}
