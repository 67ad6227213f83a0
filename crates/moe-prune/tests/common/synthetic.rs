//! Models that are formulas: scores, shapes and probes whose answers are known.

use moe_checkpoint::{Denominator, Granularity, LayerScores, MoeLayerShape, MoeShape, Pool, Provenance, ScoreTable};
use moe_prune::{
    AllocationRequest, Budget, Distortion, ExpertLimits, LayerKept, Limits, ModelProbe, ProtectionMask, Result,
};

/// `layers` MoE layers (every second decoder layer) of `experts` experts of this width; the router selects one.
pub fn shape(layers: usize, experts: usize, width: usize) -> MoeShape {
    let layer = |l: usize| MoeLayerShape { layer: 2 * l + 1, widths: vec![width; experts] };
    MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers: (0..layers).map(layer).collect() }
}

/// A table of these scores, by MoE layer and expert.
pub fn table(granularity: Granularity, scores: &[Vec<Vec<f32>>]) -> ScoreTable {
    let layer = |(l, scores): (usize, &Vec<Vec<f32>>)| LayerScores {
        layer: 2 * l + 1,
        scores: scores.clone(),
        routed: None,
        whole: None,
    };
    ScoreTable {
        scorer: r#"{"type":"synthetic"}"#.into(),
        granularity,
        pool: Pool::Global,
        additive: Some(Pool::Global),
        denominator: Denominator::None,
        layers: scores.iter().enumerate().map(layer).collect(),
        provenance: Provenance::new("model", "data", "{}"),
    }
}

/// Expert scores.
pub fn expert_table(scores: &[Vec<f32>]) -> ScoreTable {
    let layer = |layer: &Vec<f32>| layer.iter().map(|score| vec![*score]).collect();
    table(Granularity::Expert, &scores.iter().map(layer).collect::<Vec<_>>())
}

/// Numbers in [0, 1) without a pattern.
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Unit scores of a shape.
    pub fn units(&mut self, shape: &MoeShape) -> ScoreTable {
        let mut expert = |width: &usize| (0..*width).map(|_| self.next() as f32).collect::<Vec<_>>();
        let scores: Vec<Vec<Vec<f32>>> =
            shape.layers.iter().map(|layer| layer.widths.iter().map(&mut expert).collect()).collect();
        table(Granularity::Unit, &scores)
    }

    /// Expert scores of a shape.
    pub fn experts(&mut self, shape: &MoeShape) -> ScoreTable {
        let scores: Vec<Vec<f32>> =
            shape.layers.iter().map(|layer| layer.widths.iter().map(|_| self.next() as f32).collect()).collect();
        expert_table(&scores)
    }
}

/// A request for whole experts.
pub fn experts_request<'a>(
    scores: &'a ScoreTable,
    shape: &'a MoeShape,
    budget: Budget,
    protect: &'a ProtectionMask,
) -> AllocationRequest<'a> {
    let limits = Limits::Experts(ExpertLimits::default());
    AllocationRequest { scores, shape, budget, protect, limits, gone: None }
}

/// Experts without units, by MoE layer.
pub fn emptied(kept: &[LayerKept]) -> Vec<Vec<usize>> {
    let of = |layer: &LayerKept| (0..layer.experts.len()).filter(|e| layer.experts[*e].is_empty()).collect();
    kept.iter().map(of).collect()
}

/// Distortions of layers add: `curves[layer][experts lost]`, where an expert that lost a part of its units counts as
/// that part, rounded down over the layer.
pub struct Additive {
    pub width: usize,
    pub curves: Vec<Vec<f64>>,
    /// Times the product of the layers' distortions: what does not add.
    pub interaction: f64,
    pub runs: usize,
}

impl Additive {
    pub fn new(width: usize, curves: Vec<Vec<f64>>) -> Self {
        Self { width, curves, interaction: 0.0, runs: 0 }
    }
}

impl ModelProbe for Additive {
    fn distortion(&mut self, kept: &[LayerKept]) -> Result<Distortion> {
        self.runs += 1;
        let lost =
            |layer: &LayerKept| layer.experts.iter().map(|kept| self.width - kept.len()).sum::<usize>() / self.width;
        let parts: Vec<f64> = kept.iter().zip(&self.curves).map(|(layer, curve)| curve[lost(layer)]).collect();
        let mean = parts.iter().sum::<f64>() + self.interaction * parts.iter().product::<f64>();
        Ok(Distortion { mean, worst: 2.0 * mean, overlap: 1.0 / (1.0 + mean) })
    }

    fn gain_gradient(&mut self, _: &[Vec<f32>], _: usize) -> Result<(f64, Vec<Vec<f32>>)> {
        unimplemented!("a probe of curves")
    }

    fn layer_errors(&mut self, layer: usize, candidates: &[Vec<u32>]) -> Result<Vec<f64>> {
        // Errors are norms: their squares are in proportion to distortions.
        Ok(candidates.iter().map(|gone| (0.25 * self.curves[layer / 2][gone.len()]).sqrt()).collect())
    }

    fn settle(&mut self, _: usize, _: &[u32]) -> Result<()> {
        Ok(())
    }
}

/// `sum_e a_e (1 - g_e)^2 + sum_pairs b (1 - g_i)^2 (1 - g_j)^2` over experts `[layer][expert]` counted through.
pub struct Planted {
    pub experts: usize,
    pub importance: Vec<f64>,
    /// What losing both of two experts costs on top.
    pub pairs: Vec<(usize, usize, f64)>,
    /// What was settled, in order.
    pub settled: Vec<(usize, Vec<u32>)>,
}

impl Planted {
    pub fn cost(&self, gains: &[f64]) -> f64 {
        let lost: Vec<f64> = gains.iter().map(|g| (1.0 - g) * (1.0 - g)).collect();
        let own: f64 = lost.iter().zip(&self.importance).map(|(lost, a)| lost * a).sum();
        own + self.pairs.iter().map(|(i, j, b)| b * lost[*i] * lost[*j]).sum::<f64>()
    }

    pub fn cost_of(&self, kept: &[LayerKept]) -> f64 {
        let gain = |kept: &Vec<u32>| if kept.is_empty() { 0.0 } else { 1.0 };
        self.cost(&kept.iter().flat_map(|layer| layer.experts.iter().map(gain)).collect::<Vec<f64>>())
    }
}

impl ModelProbe for Planted {
    fn distortion(&mut self, kept: &[LayerKept]) -> Result<Distortion> {
        let mean = self.cost_of(kept);
        Ok(Distortion { mean, worst: mean, overlap: 1.0 / (1.0 + mean) })
    }

    fn gain_gradient(&mut self, gains: &[Vec<f32>], _: usize) -> Result<(f64, Vec<Vec<f32>>)> {
        let flat: Vec<f64> = gains.iter().flatten().map(|g| f64::from(*g)).collect();
        let mut d: Vec<f64> = flat.iter().zip(&self.importance).map(|(g, a)| -2.0 * a * (1.0 - g)).collect();
        for (i, j, b) in &self.pairs {
            d[*i] -= 2.0 * b * (1.0 - flat[*i]) * (1.0 - flat[*j]).powi(2);
            d[*j] -= 2.0 * b * (1.0 - flat[*j]) * (1.0 - flat[*i]).powi(2);
        }
        let d: Vec<f32> = d.into_iter().map(|d| d as f32).collect();
        Ok((self.cost(&flat), d.chunks(self.experts).map(<[f32]>::to_vec).collect()))
    }

    fn layer_errors(&mut self, layer: usize, candidates: &[Vec<u32>]) -> Result<Vec<f64>> {
        let first = layer / 2 * self.experts;
        let error = |gone: &Vec<u32>| {
            let mut gains = vec![1.0; self.importance.len()];
            gone.iter().for_each(|expert| gains[first + *expert as usize] = 0.0);
            // What is settled costs more together with this.
            let settled: usize = self.settled.iter().map(|(_, gone)| gone.len()).sum();
            self.cost(&gains).sqrt() * (1.0 + settled as f64)
        };
        Ok(candidates.iter().map(error).collect())
    }

    fn settle(&mut self, layer: usize, removed: &[u32]) -> Result<()> {
        self.settled.push((layer, removed.to_vec()));
        Ok(())
    }
}
