use std::collections::BTreeMap;

use moe_checkpoint::{Activation, ExpertWeights};

use super::*;
use crate::evidence::{LayerEvidence, OutputMean, TokenSample};
use crate::similarity::{Metric, Similarity};
use crate::testing::{expert, noise, shuffled};

const HIDDEN: usize = 6;

/// A layer to group: experts, router rows, importance, evidence.
#[derive(Clone)]
struct Layer {
    experts: Vec<ExpertWeights>,
    router: Vec<f32>,
    importance: Vec<f64>,
    protected: Vec<bool>,
    evidence: LayerEvidence,
}

impl Layer {
    fn new(experts: usize) -> Self {
        let tokens = 40;
        let inputs = noise(tokens * HIDDEN, 77);
        let router = noise(experts * HIDDEN, 78);
        let logits: Vec<f32> = inputs
            .chunks_exact(HIDDEN)
            .flat_map(|x| {
                router.chunks_exact(HIDDEN).map(move |row| row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>())
            })
            .collect();
        let mut selected = Vec::new();
        for row in logits.chunks_exact(experts) {
            let logits: Vec<f64> = row.iter().map(|z| f64::from(*z)).collect();
            selected.extend(ranked(&logits).iter().take(2).map(|e| *e as u32));
        }
        let weights = vec![0.5; selected.len()];
        let sample = TokenSample { inputs, logits, selected, weights, hidden: HIDDEN, experts, top_k: 2 };
        Self {
            experts: (0..experts).map(|e| expert(HIDDEN, 4, e as u64 + 1)).collect(),
            router,
            importance: noise(experts, 79).iter().map(|v| f64::from(v.abs())).collect(),
            protected: vec![false; experts],
            evidence: LayerEvidence { tokens: 40, sample: Some(sample), ..LayerEvidence::default() },
        }
    }

    fn group(&self, grouping: &GroupingConfig, count: usize) -> Result<Groups> {
        let context = LayerContext {
            layer: 3,
            experts: &self.experts,
            router: Some(&self.router),
            evidence: &self.evidence,
            activation: Activation::Silu,
            importance: &self.importance,
            protected: &self.protected,
            router_groups: 1,
        };
        grouping.group(&context, count)
    }

    /// The same layer with expert `order[i]` in place `i`.
    fn permuted(&self, order: &[u32]) -> Self {
        let mut to = vec![0; order.len()];
        order.iter().enumerate().for_each(|(at, e)| to[*e as usize] = at as u32);
        let pick = |e: &u32| *e as usize;
        Self {
            experts: order.iter().map(|e| self.experts[pick(e)].clone()).collect(),
            router: order.iter().flat_map(|e| self.router[pick(e) * HIDDEN..][..HIDDEN].to_vec()).collect(),
            importance: order.iter().map(|e| self.importance[pick(e)]).collect(),
            protected: order.iter().map(|e| self.protected[pick(e)]).collect(),
            evidence: LayerEvidence {
                sample: self.evidence.sample.as_ref().map(|sample| sample.renamed(&to)),
                ..self.evidence.clone()
            },
        }
    }
}

fn every_grouping() -> Vec<GroupingConfig> {
    let all = OutputMean::All;
    let similarities = [
        Similarity::of(Features::RouterLogits, Metric::Cosine),
        Similarity::of(Features::RouterRows, Metric::Euclidean),
        Similarity::of(Features::Weights { parts: Default::default() }, Metric::Cosine),
        Similarity::of(Features::Outputs { over: OutputMean::Routed }, Metric::Cosine),
        Similarity::ream(),
    ];
    let mut all_of_them: Vec<GroupingConfig> = similarities
        .into_iter()
        .flat_map(|similarity| {
            [
                GroupingConfig::Dominant(Dominant { similarity: similarity.clone(), capacity: None }),
                GroupingConfig::Dominant(Dominant { similarity: similarity.clone(), capacity: Some(4) }),
                GroupingConfig::CappedCentroids(CappedCentroids { similarity: similarity.clone(), capacity: Some(5) }),
                GroupingConfig::Spectral(Spectral { similarity, seed: 5, restarts: 3 }),
            ]
        })
        .collect();
    for metric in [Metric::Cosine, Metric::Euclidean, Metric::UnitEuclidean] {
        let features = Features::Outputs { over: all };
        all_of_them.push(GroupingConfig::Hierarchical(Hierarchical { features, metric, linkage: Linkage::Average }));
        all_of_them.push(GroupingConfig::KMeans(KMeans { features, metric, seed: 9, restarts: 3 }));
    }
    all_of_them.push(GroupingConfig::Retain(Retain {}));
    all_of_them
}

#[test]
fn every_grouping_makes_exactly_the_groups_asked_for_and_follows_the_experts() {
    let layer = Layer::new(11);
    let order = shuffled(11, 4);
    let permuted = layer.permuted(&order);
    for grouping in every_grouping() {
        grouping.validate().unwrap();
        for count in [3, 6, 11] {
            let groups = layer.group(&grouping, count).unwrap();
            assert_eq!(groups.groups.len(), count, "{grouping:?}");
            let mut seen: Vec<usize> = groups.groups.iter().flat_map(|g| g.members.clone()).collect();
            seen.extend(&groups.dissolved);
            seen.sort_unstable();
            assert_eq!(seen, (0..11).collect::<Vec<_>>(), "{grouping:?}");
            assert!(groups.groups.iter().all(|g| g.members.contains(&g.dominant)));
            assert!(groups.groups.windows(2).all(|pair| pair[0].dominant < pair[1].dominant));
            assert_eq!(groups, layer.group(&grouping, count).unwrap());
            if matches!(grouping, GroupingConfig::Dominant(_) | GroupingConfig::CappedCentroids(_)) {
                // What pruning by the same importance keeps.
                let mut kept = ranked(&layer.importance)[..count].to_vec();
                kept.sort_unstable();
                assert_eq!(groups.groups.iter().map(|g| g.dominant).collect::<Vec<_>>(), kept, "{grouping:?}");
            }

            let back = |e: &usize| order[*e] as usize;
            let found = permuted.group(&grouping, count).unwrap();
            let renamed = found
                .groups
                .iter()
                .map(|g| Members { dominant: back(&g.dominant), members: g.members.iter().map(back).collect() });
            let mut dissolved: Vec<usize> = found.dissolved.iter().map(back).collect();
            dissolved.sort_unstable();
            assert_eq!(Groups::sorted(renamed.collect(), dissolved), groups, "{grouping:?} {count}");
        }
    }
}

#[test]
fn protected_experts_are_alone() {
    let mut layer = Layer::new(11);
    // The least important one among them.
    let least = *ranked(&layer.importance).last().unwrap();
    layer.protected[least] = true;
    layer.protected[(least + 4) % 11] = true;
    for grouping in every_grouping() {
        let groups = layer.group(&grouping, 5).unwrap();
        for protected in [least, (least + 4) % 11] {
            let own = groups.groups.iter().find(|g| g.members.contains(&protected)).unwrap();
            assert_eq!(own.members, [protected], "{grouping:?}");
        }
        assert_eq!(groups.groups.len(), 5);
        if !matches!(grouping, GroupingConfig::Retain(_)) {
            let message = layer.group(&grouping, 2).unwrap_err().to_string();
            assert!(message.contains("layer 3") && message.contains("protected"), "{message}");
        }
        assert!(layer.group(&grouping, 1).is_err());
    }
}

#[test]
fn clones_share_a_group() {
    let mut layer = Layer::new(9);
    // Experts 1, 4, 7 are one, 2, 5 another.
    for (from, to) in [(1, 4), (1, 7), (2, 5)] {
        layer.experts[to] = layer.experts[from].clone();
        for h in 0..HIDDEN {
            layer.router[to * HIDDEN + h] = layer.router[from * HIDDEN + h];
        }
        let sample = layer.evidence.sample.as_mut().unwrap();
        for logits in sample.logits.chunks_exact_mut(9) {
            logits[to] = logits[from];
        }
    }
    layer.importance = vec![0.5, 0.9, 0.8, 0.45, 0.1, 0.2, 0.44, 0.3, 0.43];
    let all = OutputMean::All;
    let similarity = Similarity::of(Features::RouterLogits, Metric::Cosine);
    for grouping in [
        GroupingConfig::Dominant(Dominant { similarity: similarity.clone(), capacity: None }),
        GroupingConfig::CappedCentroids(CappedCentroids { similarity: Similarity::ream(), capacity: Some(3) }),
        GroupingConfig::Hierarchical(Hierarchical {
            features: Features::Outputs { over: all },
            metric: Metric::Euclidean,
            linkage: Linkage::Average,
        }),
        GroupingConfig::KMeans(KMeans {
            features: Features::Outputs { over: all },
            metric: Metric::Cosine,
            seed: 0,
            restarts: 20,
        }),
        GroupingConfig::Spectral(Spectral { similarity, seed: 0, restarts: 20 }),
    ] {
        let groups = layer.group(&grouping, 6).unwrap();
        let of = |e: usize| groups.groups.iter().find(|g| g.members.contains(&e)).unwrap();
        assert_eq!(of(1).members, [1, 4, 7], "{grouping:?}");
        assert_eq!((of(1).dominant, of(2).dominant), (1, 2));
        assert_eq!(of(5).members, [2, 5], "{grouping:?}");
    }
}

#[test]
fn logits_decide_where_weights_disagree() {
    let mut layer = Layer::new(4);
    // Weights say 2 is like 0; logits say it is like 1.
    layer.experts[2] = layer.experts[0].clone();
    let columns = [[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]];
    layer.evidence.sample = None;
    let gram = Gram::of_vectors(&columns.concat(), 4);
    layer.evidence.logit_gram = Some(gram.values);
    layer.importance = vec![0.4, 0.3, 0.2, 0.1];
    let of = |features| {
        let similarity = Similarity::of(features, Metric::Cosine);
        layer.group(&GroupingConfig::Dominant(Dominant { similarity, capacity: None }), 2).unwrap()
    };
    assert_eq!(of(Features::RouterLogits).groups[1].members, [1, 2]);
    assert!(of(Features::Weights { parts: Default::default() }).groups[0].members.contains(&2));
    let missing = Similarity::of(Features::Outputs { over: OutputMean::All }, Metric::Cosine);
    let missing = GroupingConfig::Dominant(Dominant { similarity: missing, capacity: None });
    assert!(layer.group(&missing, 2).unwrap_err().to_string().contains("sample of the layer's tokens"));
}

use crate::context::Gram;

#[test]
fn capacities_hold_and_may_be_too_small() {
    let layer = Layer::new(11);
    let similarity = Similarity::of(Features::RouterLogits, Metric::Cosine);
    let capped = GroupingConfig::CappedCentroids(CappedCentroids { similarity: similarity.clone(), capacity: Some(4) });
    let groups = layer.group(&capped, 5).unwrap();
    let mut sizes: Vec<usize> = groups.groups.iter().map(|g| g.members.len()).collect();
    sizes.sort_unstable();
    // Two full groups, and three centroids alone: the first ones take what they can hold.
    assert_eq!(sizes, [1, 1, 1, 4, 4]);
    assert!(layer.group(&capped, 2).unwrap_err().to_string().contains("3 are left over"));
    // In proportion to the experts, or what fills the groups.
    let largest = |count| {
        let grouping = CappedCentroids { similarity: similarity.clone(), capacity: None };
        let groups = layer.group(&GroupingConfig::CappedCentroids(grouping), count).unwrap();
        groups.groups.iter().map(|g| g.members.len()).max().unwrap()
    };
    assert_eq!([8, 5, 2, 1].map(largest), [2, 3, 6, 11]);
    let limited = GroupingConfig::Dominant(Dominant { similarity, capacity: Some(3) });
    assert!(layer.group(&limited, 4).unwrap().groups.iter().all(|g| g.members.len() <= 3));
    assert!(layer.group(&limited, 3).unwrap_err().to_string().contains("at most 3"));
}

#[test]
fn collected_outputs_win_over_the_sample() {
    let mut layer = Layer::new(4);
    let vectors: Vec<f64> = [[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [5.0, 0.0]]
        .iter()
        .flat_map(|v| [v.as_slice(), &[0.0; HIDDEN - 2]].concat())
        .collect();
    layer.evidence.outputs = BTreeMap::from([(OutputMean::All, vectors)]);
    let features = Features::Outputs { over: OutputMean::All };
    let linkage = Linkage::Average;
    let grouping = GroupingConfig::Hierarchical(Hierarchical { features, metric: Metric::Cosine, linkage });
    let groups = layer.group(&grouping, 2).unwrap();
    assert_eq!(groups.groups.iter().map(|g| g.members.clone()).collect::<Vec<_>>(), [vec![0, 3], vec![1, 2]]);
}
