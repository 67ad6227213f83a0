//! What a sweep over a model shows.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::{Device, Tensor};
use moe_core::{
    Engine, EngineOptions, Model, Result,
    data::Wave,
    host::HostView,
    trace::{ExpertTrace, IdentityTrace, LayerTrace, Observer, Signals},
};

/// Everything a sweep can show, row-major.
#[derive(Default)]
pub struct Recorder {
    pub hidden: BTreeMap<usize, Vec<f32>>,
    pub router_logits: Vec<Vec<f32>>,
    /// Routing weights `[T, E]`, zero for experts not selected.
    pub routing: Vec<Vec<f32>>,
    /// Weights of the identity experts of every token together `[T]`, of MoE layers that have some.
    pub identities: Vec<Vec<f32>>,
    pub logits: Vec<f32>,
    /// (layer, expert) -> gradients of its weights.
    pub gradients: BTreeMap<(usize, usize), Gradients>,
}

/// Gradients of one expert's weights.
#[derive(Default)]
pub struct Gradients {
    /// `[2I, H]`.
    pub gate_up: Vec<f32>,
    /// `[H, I]`.
    pub down: Vec<f32>,
    /// `[2I]`.
    pub gate_up_bias: Vec<f32>,
    /// `[H]`.
    pub down_bias: Vec<f32>,
}

impl Gradients {
    pub fn parts(&self) -> [(&'static str, &[f32]); 4] {
        [
            ("gate_up", &self.gate_up),
            ("down", &self.down),
            ("gate_up bias", &self.gate_up_bias),
            ("down bias", &self.down_bias),
        ]
    }
}

impl Observer for Recorder {
    fn needs(&self) -> Signals {
        Signals {
            routing: true,
            units: true,
            outputs: true,
            gradients: true,
            hidden: true,
            logits: true,
            ..Signals::NONE
        }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.router_logits.push(trace.logits.to_vec());
        let mut routing = vec![0.0; trace.logits.len()];
        for (slot, (&expert, &weight)) in trace.selected.iter().zip(trace.weights).enumerate() {
            if trace.is_seen(slot) {
                routing[slot / trace.top_k * trace.experts + expert as usize] = weight;
            }
        }
        self.routing.push(routing);
        Ok(())
    }

    fn identities(&mut self, trace: &IdentityTrace<'_>) -> Result<()> {
        // Their logits follow those of the routed experts of the layer, which came before.
        let tokens = trace.weights.len();
        let own = self.router_logits.pop().expect("the layer was shown");
        let rows = own.chunks_exact(own.len() / tokens).zip(trace.logits.chunks_exact(trace.identities));
        self.router_logits.push(rows.flat_map(|(own, identities)| [own, identities].concat()).collect());
        self.identities.push(trace.weights.to_vec());
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        let backward = trace.backward.expect("asked for");
        let weights = Tensor::<1>::from_floats(trace.routing_weights, &trace.input.device()).unsqueeze_dim::<2>(1);
        let gate_up = backward.gate_up.clone().transpose().matmul(trace.input.clone());
        let upstream = backward.upstream.clone() * weights;
        let down = upstream.clone().transpose().matmul(trace.units.expect("asked for").clone());
        // the output signal is f(x): check it against its definition on the way
        let output = trace.expert_weights.output(trace.units.unwrap());
        let (a, b) = (HostView::new(&output), HostView::new(trace.output.expect("asked for")));
        assert!(a.as_slice().iter().zip(b.as_slice()).all(|(a, b)| (a - b).abs() < 1e-5));
        let values = |x: Tensor<2>| HostView::new(&x).as_slice().to_vec();
        let gradients = Gradients {
            gate_up: values(gate_up),
            down: values(down),
            gate_up_bias: values(backward.gate_up.clone().sum_dim(0)),
            down_bias: values(upstream.sum_dim(0)),
        };
        self.gradients.insert((trace.layer, trace.expert), gradients);
        Ok(())
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> Result<()> {
        self.hidden.insert(layer, HostView::new(hidden).as_slice().to_vec());
        Ok(())
    }

    fn logits(&mut self, first: usize, logits: &HostView, vocab: usize) -> Result<()> {
        assert_eq!(first * vocab, self.logits.len());
        self.logits.extend_from_slice(logits.as_slice());
        Ok(())
    }
}

/// Runs a wave through a model, and gives its mean loss, too.
pub fn run(dir: &Path, wave: &Wave, max_memory: Option<u64>) -> Result<(Recorder, f64)> {
    let model = Model::open(dir, &Device::flex(), max_memory)?;
    let mut recorder = Recorder::default();
    let report =
        Engine::new(&model, EngineOptions { head_tokens: 16, ..Default::default() }).run(wave, &mut recorder)?;
    assert_eq!(report.loss_tokens, wave.loss_tokens());
    Ok((recorder, report.loss.expect("asked for") / report.loss_tokens as f64))
}
