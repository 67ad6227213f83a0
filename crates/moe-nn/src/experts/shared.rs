//! Networks that every token runs through.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};

use super::Activation;

/// Configuration of a [`FeedForward`].
#[derive(Config, Debug)]
pub struct FeedForwardConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size.
    pub d_ff: usize,
    /// The activation of the gate.
    #[config(default = "Activation::Silu")]
    pub activation: Activation,
}

/// `down(act(gate(x)) * up(x))`: the dense feed-forward network that gated experts are of the shape of.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// Hidden to intermediate.
    pub gate: Linear,
    /// Hidden to intermediate.
    pub up: Linear,
    /// Intermediate to hidden.
    pub down: Linear,
    #[module(skip)]
    pub(crate) activation: Activation,
}

impl FeedForwardConfig {
    /// Makes the network.
    pub fn init(&self, device: &Device) -> FeedForward {
        let linear = |from: usize, to: usize| LinearConfig::new(from, to).with_bias(false).init(device);
        FeedForward {
            gate: linear(self.d_model, self.d_ff),
            up: linear(self.d_model, self.d_ff),
            down: linear(self.d_ff, self.d_model),
            activation: self.activation,
        }
    }
}

impl FeedForward {
    /// `[..., hidden] -> [..., hidden]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.down.forward(self.hidden(x))
    }

    /// What the down projection reads: `[..., hidden] -> [..., intermediate]`.
    pub fn hidden<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.activation.of(self.gate.forward(x.clone())) * self.up.forward(x)
    }
}

/// Configuration of a [`SharedExpert`].
#[derive(Config, Debug)]
pub struct SharedExpertConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size.
    pub d_ff: usize,
    /// Whether its output is multiplied by a sigmoid of the token (Qwen2-MoE).
    #[config(default = false)]
    pub gated: bool,
    /// The activation of the network.
    #[config(default = "Activation::Silu")]
    pub activation: Activation,
}

/// A network that every token runs through, beside the experts that it chooses.
#[derive(Module, Debug)]
pub struct SharedExpert {
    /// The network.
    pub network: FeedForward,
    /// Hidden to 1, without bias.
    pub gate: Option<Linear>,
}

impl SharedExpertConfig {
    /// Makes the shared expert.
    pub fn init(&self, device: &Device) -> SharedExpert {
        let network = FeedForwardConfig::new(self.d_model, self.d_ff).with_activation(self.activation).init(device);
        let gate = self.gated.then(|| LinearConfig::new(self.d_model, 1).with_bias(false).init(device));
        SharedExpert { network, gate }
    }
}

impl SharedExpert {
    /// `[..., hidden] -> [..., hidden]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let output = self.network.forward(x.clone());
        match &self.gate {
            Some(gate) => output * sigmoid(gate.forward(x)),
            None => output,
        }
    }
}
