//! The first source of weights: the files of a model directory.

use std::borrow::Cow;
use std::ops::Range;

use crate::fingerprint;
use crate::shard::Shard;
use crate::source::ModelSource;
use crate::weights::TensorInfo;
use crate::{Checkpoint, Result};

/// Mapped weight files.
pub(crate) struct Files {
    pub shards: Vec<Shard>,
}

impl ModelSource for Files {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let begin = tensor.begin();
        Ok(Cow::Borrowed(self.shards[tensor.shard()].bytes(begin + range.start..begin + range.end)?))
    }

    fn grain(&self, _tensor: &TensorInfo) -> usize {
        1
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        let begin = tensor.begin();
        self.shards[tensor.shard()].release(begin + range.start..begin + range.end);
    }

    fn release_all(&self) {
        self.shards.iter().for_each(Shard::release_all);
    }

    fn read_ahead(&self, model: &Checkpoint, layer: usize) {
        let of_layer = model.tensors().filter(|tensor| model.is_of_layer(tensor, layer));
        let mut places: Vec<(usize, Range<usize>)> =
            of_layer.map(|tensor| (tensor.shard(), tensor.begin()..tensor.begin() + tensor.bytes as usize)).collect();
        places.sort_by_key(|(shard, range)| (*shard, range.start));
        // Neighbors in one go.
        let neighbors = |a: &(usize, Range<usize>), b: &(usize, Range<usize>)| a.0 == b.0 && a.1.end >= b.1.start;
        for run in places.chunk_by(neighbors) {
            self.shards[run[0].0].read_ahead(run[0].1.start..run[run.len() - 1].1.end);
        }
    }

    fn fingerprint(&self, model: &Checkpoint) -> String {
        self.shards.iter().for_each(|shard| shard.set_random(true));
        let digest = fingerprint::compute(model, &self.shards);
        self.shards.iter().for_each(|shard| shard.set_random(false));
        digest
    }
}
