//! Evolving which experts of a layer go, then choosing among the best sets of neighboring layers.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::{Granularity, Routing};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::subset::{GroupChoice, choices};
use super::{ExpertPruner, PruneRequest, Pruner};
use crate::allocators::{Allocator, AllocatorConfig, DepthPrior, LayerAllocation, Prior};
use crate::plan::LayerKept;
use crate::probe::{ModelProbe, everything};
use crate::ranking::compare;
use crate::recipe::tagged;
use crate::{Allocation, Error, Needs, Questions, Result};

/// Combinations of the sets of a block of layers that are run at most.
const COMBINATIONS: usize = 4096;

/// The pruning of whole experts of MoE-I² (arXiv 2411.01016). Needs a probe.
///
/// - **How many.** The allocator says how many experts every layer loses; by default, layers keep in proportion to what
///   losing one of their experts does to the model ([`Prior::Importance`]).
/// - **Layer-wise genetic search.** Sets of experts of a layer are evolved by the Frobenius norm of the difference that
///   their removal makes to the output of the layer. A child keeps the experts that both of its parents lose and draws
///   the others from those that one of them loses; then one of its experts may change places with one that stays. The
///   best [`keep`](Self::keep) sets of a layer go on (K).
/// - **Block-wise reception field.** Of every [`block`](Self::block) neighboring MoE layers (T), all combinations of
///   their sets are run, with the layers before as they were decided and those after whole; the combination whose model
///   diverges least from the full one stays.
///
/// The source does not give its operators, sizes or the rule from importance to counts in full: these are ours. Its
/// second half, ranks of the experts that stay, is a method of weights and not of this crate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GeneticPruner {
    /// How many experts every layer loses.
    pub allocator: AllocatorConfig,
    /// Groups of neighboring experts that lose as many each.
    pub groups: usize,
    /// No layer keeps fewer experts.
    pub min_experts: usize,
    /// Every layer keeps a multiple of this many experts.
    pub multiple_of: usize,
    /// Sets of every generation of a layer, at least 2.
    pub population: usize,
    /// Generations after the first.
    pub generations: usize,
    /// Probability, in [0, 1], that an expert of a child changes places with one that stays.
    pub mutation: f64,
    /// Sets of a layer that go on, K.
    pub keep: usize,
    /// Neighboring layers that are decided together, T.
    pub block: usize,
    /// Seed of everything random.
    pub seed: u64,
}

impl Default for GeneticPruner {
    /// Counts by importance; 32 sets, 20 generations, half of the children mutated, 3 sets of 3 layers, seed 0.
    fn default() -> Self {
        let allocator =
            AllocatorConfig::DepthPrior(DepthPrior { prior: Prior::Importance, within: Default::default() });
        Self {
            allocator,
            groups: 1,
            min_experts: 0,
            multiple_of: 1,
            population: 32,
            generations: 20,
            mutation: 0.5,
            keep: 3,
            block: 3,
            seed: 0,
        }
    }
}

impl GeneticPruner {
    /// Keeps what this routing needs; see [`ExpertLimits::for_routing`](crate::ExpertLimits::for_routing).
    pub fn for_routing(mut self, routing: &Routing) -> Self {
        let limits = crate::ExpertLimits::for_routing(routing);
        (self.groups, self.min_experts) = (limits.groups, limits.min_experts);
        self
    }

    fn validate(&self) -> Result<()> {
        let invalid = |field, found: String, expected: &str| {
            Err(Error::InvalidParameter { field, found, expected: expected.into() })
        };
        if self.population < 2 {
            return invalid("population", self.population.to_string(), "at least 2");
        }
        if !(0.0..=1.0).contains(&self.mutation) {
            return invalid("mutation", self.mutation.to_string(), "a number in [0, 1]");
        }
        if self.keep == 0 || self.keep > self.population {
            return invalid("keep", self.keep.to_string(), "at least 1 and at most the population");
        }
        let exponent = u32::try_from(self.block).unwrap_or(u32::MAX);
        if self.block == 0 || self.keep.checked_pow(exponent).is_none_or(|count| count > COMBINATIONS) {
            let found = format!("{} layers of {} sets", self.block, self.keep);
            return invalid("block", found, "at least 1, and at most 4096 combinations of sets to the power of layers");
        }
        Ok(())
    }

    /// The best sets of a layer, best first, with their errors.
    fn evolve(
        &self,
        layer: usize,
        groups: &[GroupChoice],
        lowest: &[u32],
        probe: &mut dyn ModelProbe,
    ) -> Result<Vec<(f64, Vec<u32>)>> {
        // A stream of its own for every layer: what one layer draws does not depend on the others.
        let mut random = ChaCha8Rng::seed_from_u64(self.seed ^ (layer as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut known: BTreeMap<Vec<u32>, f64> = BTreeMap::new();
        let mut measure = |sets: BTreeSet<Vec<u32>>, ranked: &mut Vec<(f64, Vec<u32>)>| -> Result<()> {
            let fresh: Vec<Vec<u32>> = sets.into_iter().filter(|set| !known.contains_key(set)).collect();
            let errors = if fresh.is_empty() { Vec::new() } else { probe.layer_errors(layer, &fresh)? };
            for (set, error) in fresh.into_iter().zip(errors) {
                if !error.is_finite() {
                    let found = format!("an error of {error} for layer {layer}");
                    let expected = "a finite error for every candidate".into();
                    return Err(Error::InvalidParameter { field: "probe", found, expected });
                }
                known.insert(set.clone(), error);
                ranked.push((error, set));
            }
            ranked.sort_by(|a, b| compare(a.0, b.0).then_with(|| a.1.cmp(&b.1)));
            ranked.truncate(self.population);
            Ok(())
        };
        let mut first = BTreeSet::from([lowest.to_vec()]);
        // Few experts have fewer sets than the population.
        for _ in 0..self.population * 4 {
            if first.len() < self.population {
                first.insert(drawn(groups, |group| group.free.clone(), &mut random));
            }
        }
        let mut ranked = Vec::new();
        measure(first, &mut ranked)?;
        for _ in 0..self.generations {
            let mut children = BTreeSet::new();
            for _ in 0..self.population {
                // Fitter ones stand first: the better of two drawn at random.
                let mut parent = || {
                    let mut draw = || random.random_range(0..ranked.len());
                    &ranked[draw().min(draw())].1
                };
                let (mother, father) = (parent(), parent());
                children.insert(self.child(groups, mother, father, &mut random));
            }
            measure(children, &mut ranked)?;
        }
        ranked.truncate(self.keep);
        Ok(ranked)
    }

    /// A set of two: what both lose, and the rest from what one of them loses; then, perhaps, one expert for another.
    fn child(&self, groups: &[GroupChoice], mother: &[u32], father: &[u32], random: &mut ChaCha8Rng) -> Vec<u32> {
        let has = |set: &[u32], expert: &u32| set.binary_search(expert).is_ok();
        let mut child = Vec::with_capacity(mother.len());
        for group in groups {
            let both = group.free.iter().filter(|e| has(mother, e) && has(father, e));
            let mut own: Vec<u32> = both.copied().collect();
            let mut one: Vec<u32> = group.free.iter().filter(|e| has(mother, e) != has(father, e)).copied().collect();
            let (more, _) = one.partial_shuffle(random, group.picks - own.len());
            own.extend_from_slice(more);
            let stays: Vec<u32> = group.free.iter().filter(|e| !own.contains(e)).copied().collect();
            if !own.is_empty() && !stays.is_empty() && random.random_bool(self.mutation) {
                let (out, into) = (random.random_range(0..own.len()), random.random_range(0..stays.len()));
                own[out] = stays[into];
            }
            child.extend(own);
            child.extend_from_slice(&group.gone);
        }
        child.sort_unstable();
        child
    }
}

/// A set whose experts are drawn from these of every group.
fn drawn(groups: &[GroupChoice], from: impl Fn(&GroupChoice) -> Vec<u32>, random: &mut ChaCha8Rng) -> Vec<u32> {
    let mut set = Vec::new();
    for group in groups {
        let mut of_group = from(group);
        let (picked, _) = of_group.partial_shuffle(random, group.picks);
        set.extend_from_slice(picked);
        set.extend_from_slice(&group.gone);
    }
    set.sort_unstable();
    set
}

/// All ways to choose one of so many of each, the first ones first.
fn combinations(counts: &[usize]) -> Vec<Vec<usize>> {
    counts.iter().fold(vec![Vec::new()], |all, count| {
        let longer = |chosen: &Vec<usize>| (0..*count).map(|next| [&chosen[..], &[next]].concat()).collect::<Vec<_>>();
        all.iter().flat_map(longer).collect()
    })
}

/// A layer without a set of its experts.
fn without(layer: &LayerKept, removed: &[u32]) -> LayerKept {
    let kept = |(expert, units): (usize, &Vec<u32>)| match removed.binary_search(&(expert as u32)) {
        Ok(_) => Vec::new(),
        Err(_) => units.clone(),
    };
    LayerKept {
        layer: layer.layer,
        experts: layer.experts.iter().enumerate().map(kept).collect(),
        removed: removed.to_vec(),
    }
}

impl Pruner for GeneticPruner {
    fn recipe(&self) -> Value {
        tagged("genetic", self)
    }

    fn needs(&self) -> Needs {
        let asked = Questions { layer_errors: true, distortion: true, ..Questions::NONE };
        self.allocator.needs(Granularity::Expert).asking(asked)
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        self.validate()?;
        let Self { groups, min_experts, multiple_of, .. } = *self;
        let counts = ExpertPruner { allocator: self.allocator.clone(), groups, min_experts, multiple_of };
        let limits = request.with_limits(counts.limits());
        let mut allocation = self.allocator.allocate_with(&limits, probe)?;
        let mut found = Vec::with_capacity(allocation.layers.len());
        for (position, (layer, shape)) in allocation.layers.iter().zip(&request.shape.layers).enumerate() {
            let choices = choices(request, position, shape, groups, layer.removed.len());
            found.push(self.evolve(shape.layer, &choices, &layer.removed, probe)?);
        }
        let whole = everything(request.shape);
        let mut decided = whole.clone();
        let mut measured = None;
        let mut chosen: Vec<usize> = Vec::with_capacity(found.len());
        for (block, sets) in found.chunks(self.block).enumerate() {
            let first = block * self.block;
            let mut best: Option<(f64, Vec<usize>)> = None;
            for combination in combinations(&sets.iter().map(Vec::len).collect::<Vec<_>>()) {
                for (at, (sets, set)) in sets.iter().zip(&combination).enumerate() {
                    decided[first + at] = without(&whole[first + at], &sets[*set].1);
                }
                let divergence = probe.distortion(&decided)?.mean;
                if !divergence.is_finite() {
                    let found = format!("a distortion of {divergence}");
                    let expected = "finite distortions".into();
                    return Err(Error::InvalidParameter { field: "probe", found, expected });
                }
                if best.as_ref().is_none_or(|(least, _)| divergence < *least) {
                    best = Some((divergence, combination));
                }
            }
            let Some((divergence, combination)) = best else { continue };
            for (at, (sets, set)) in sets.iter().zip(&combination).enumerate() {
                decided[first + at] = without(&whole[first + at], &sets[*set].1);
            }
            measured = Some(divergence);
            chosen.extend(combination);
        }
        let losses = found.iter().zip(&chosen).map(|(sets, set)| sets[*set].0);
        let of_layer = |(kept, loss): (LayerKept, f64)| LayerAllocation {
            layer: kept.layer,
            kept: kept.experts,
            removed: kept.removed,
            predicted: Some(loss),
        };
        let layers: Vec<LayerAllocation> = decided.into_iter().zip(losses).map(of_layer).collect();
        allocation.predicted = layers.iter().map(|layer| layer.predicted).sum();
        allocation.measured = measured;
        allocation.seed = Some(self.seed);
        Ok(allocation.with_layers(layers, request.shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_lose_what_both_parents_lose_and_nothing_that_neither_does() {
        let group = GroupChoice { gone: vec![9], free: (0..8).collect(), picks: 3 };
        let pruner = GeneticPruner { mutation: 0.0, ..GeneticPruner::default() };
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let (mother, father) = ([0, 1, 2, 9], [0, 4, 5, 9]);
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            let child = pruner.child(std::slice::from_ref(&group), &mother, &father, &mut random);
            assert_eq!(child.len(), 4);
            assert!(child.contains(&0) && child.contains(&9), "{child:?}");
            assert!(child.iter().all(|expert| mother.contains(expert) || father.contains(expert)), "{child:?}");
            seen.insert(child);
        }
        // Two of 1, 2, 4 and 5.
        assert_eq!(seen.len(), 6);
        let mutating = GeneticPruner { mutation: 1.0, ..pruner };
        let child = mutating.child(std::slice::from_ref(&group), &mother, &mother, &mut random);
        assert_eq!(child.iter().filter(|expert| mother.contains(expert)).count(), 3, "{child:?}");
    }

    #[test]
    fn all_combinations_once() {
        assert_eq!(combinations(&[2, 1, 2]), [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]);
        assert_eq!(combinations(&[]), [Vec::<usize>::new()]);
    }
}
