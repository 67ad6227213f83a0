//! Statistics, the per-wave store, and their files: folding is exact, foreign or broken files are refused.

use std::fs;
use std::path::Path;

use moe_checkpoint::group::{Group, Threads};
use moe_checkpoint::{
    ArrayKind, Error, Extent, Fold, MoeLayerShape, MoeShape, Provenance, Statistics, StatisticsSlice, StatisticsStore,
};
use proptest::prelude::*;
use tempfile::tempdir;

fn shape() -> MoeShape {
    let layers =
        vec![MoeLayerShape { layer: 0, widths: vec![3, 0, 2] }, MoeLayerShape { layer: 2, widths: vec![1, 4, 1] }];
    MoeShape { gateless: false, hidden_size: 4, top_k: 2, layers }
}

fn provenance() -> Provenance {
    Provenance::new("model", "data", r#"{"sequences":8}"#)
}

/// A wave whose values depend on its id and `seed`, of very different magnitudes so that the order of a sum shows.
fn wave(id: u64, seed: u64) -> Statistics {
    let shape = shape();
    let mut statistics = Statistics::new(&shape, provenance());
    statistics.begin(id);
    let mut state = (id + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed;
    let mut value = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let scale = 10f64.powi(((state >> 40) % 13) as i32 - 6);
        (state >> 11) as f64 / (1u64 << 53) as f64 * scale
    };
    for MoeLayerShape { layer, widths } in &shape.layers {
        for expert in 0..widths.len() {
            statistics.unit_mut("fisher", Fold::Sum, *layer, expert).unwrap().fill_with(&mut value);
            statistics.unit_mut("peak", Fold::Max, *layer, expert).unwrap().fill_with(&mut value);
        }
        statistics.expert_mut("routed", Fold::Sum, *layer).unwrap().fill_with(&mut value);
        for expert in 0..widths.len() {
            statistics.vector_mut("gram", Extent::Experts, Fold::Sum, *layer, expert).unwrap().fill_with(&mut value);
            let moments = statistics.vector_mut("moments", Extent::Moments, Fold::Moments, *layer, expert).unwrap();
            moments.fill_with(&mut value);
        }
    }
    statistics.matrix_mut("covariance", [3, 2], Fold::Sum).unwrap().fill_with(&mut value);
    for row in 0..id % 4 {
        let rows = [((id % 11 * 7 + row * 5) % 11) as f64, id as f64, row as f64, value()];
        statistics.add_rows("sample", [5, 4], 3, &rows).unwrap();
    }
    statistics.allocate("sample", ArrayKind::Matrix { rows: 5, columns: 4 }, Fold::Lowest { key: 3 }).unwrap();
    statistics.add_counts(id.wrapping_add(10), 2, id.wrapping_add(8));
    statistics
}

fn store(path: &Path) -> StatisticsStore {
    StatisticsStore::create_or_resume(path, &shape(), &provenance()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Shards of any assignment of waves, written in any order and absorbed in any order, fold to the bits of one
    /// process.
    #[test]
    fn slices_of_waves_fold_to_the_bits_of_whole_waves(seed in any::<u64>(), count in 1u64..7, owners in 1usize..7) {
        let waves: Vec<Statistics> = (0..count).map(|id| {
            let mut wave = wave(id, seed);
            wave.round_to_f32();
            wave
        }).collect();
        let mut whole = Statistics::new(&shape(), provenance());
        waves.iter().for_each(|wave| whole.fold(wave).unwrap());
        let read = |message: Vec<u8>| StatisticsSlice::from_message(&shape(), provenance(), &message).unwrap();
        let folded = (0..owners).map(|owner| {
            let mut slice = StatisticsSlice::new(&shape(), provenance());
            for wave in &waves {
                slice.fold(&read(wave.slice(owner, owners).to_message(false).unwrap())).unwrap();
            }
            slice
        });
        let folded: Vec<StatisticsSlice> = folded.collect();
        let bytes: usize = folded.iter().map(StatisticsSlice::bytes).sum();
        let largest = folded.iter().map(StatisticsSlice::bytes).max().unwrap();
        // every part of an array may be one value or vector longer than its share, and a sample is whole
        prop_assert!(largest <= bytes / owners + 8 * (8 * 9 + 20), "{largest} of {bytes}");
        let sent = folded.iter().map(|slice| read(slice.to_message(true).unwrap())).collect();
        prop_assert_eq!(StatisticsSlice::whole(sent).unwrap(), whole);
    }

    #[test]
    fn shards_fold_to_the_bits_of_one_process(
        owners in prop::collection::vec(0usize..4, 1..14),
        order in Just((0u64..14).collect::<Vec<_>>()).prop_shuffle(),
        shards in Just(vec![0usize, 1, 2, 3]).prop_shuffle(),
        seed in any::<u64>(),
    ) {
        let directory = tempdir().unwrap();
        let waves = owners.len() as u64;
        let mut one = store(&directory.path().join("one"));
        for id in 0..waves {
            one.write(&wave(id, seed)).unwrap();
        }
        let mut parts: Vec<_> = (0..4).map(|n| store(&directory.path().join(format!("part{n}")))).collect();
        for id in order.into_iter().filter(|id| *id < waves) {
            parts[owners[id as usize]].write(&wave(id, seed)).unwrap();
        }
        let mut all = store(&directory.path().join("all"));
        for shard in shards {
            all.absorb(parts[shard].directory()).unwrap();
        }
        prop_assert_eq!(all.waves(), one.waves());
        // Equality of f64 here is equality of bits: the values are positive and finite.
        prop_assert_eq!(all.fold().unwrap(), one.fold().unwrap());
    }

    #[test]
    fn save_and_load_is_exact(seed in any::<u64>(), id in any::<u64>()) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("statistics.safetensors");
        let mut statistics = wave(id >> 1, seed);
        statistics.fold(&wave((id >> 1) + 1, seed)).unwrap();
        statistics.save(&path).unwrap();
        prop_assert_eq!(Statistics::load(&path).unwrap(), statistics);
    }

    /// Any cut or flipped byte of a file gives an error or statistics, never a panic.
    #[test]
    fn broken_files_do_not_panic(cut in 0usize..4000, at in 0usize..4000, with in any::<u8>()) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("statistics.safetensors");
        wave(3, 1).save(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..cut.min(bytes.len() - 1)]).unwrap();
        prop_assert!(Statistics::load(&path).is_err());
        let mut flipped = bytes.clone();
        let at = at % flipped.len();
        flipped[at] = with;
        fs::write(&path, flipped).unwrap();
        let _ = Statistics::load(&path);
    }
}

#[test]
fn folding_sums_and_takes_maxima() {
    let shape = shape();
    let make = |id, a: f64, b: f64| {
        let mut statistics = Statistics::new(&shape, provenance());
        statistics.begin(id);
        statistics.unit_mut("sum", Fold::Sum, 2, 1).unwrap()[3] = a;
        statistics.expert_mut("max", Fold::Max, 0).unwrap()[2] = b;
        statistics.add_counts(5, 1, 4);
        statistics
    };
    let mut folded = make(0, 1.5, 7.0);
    folded.fold(&make(4, 2.0, 3.0)).unwrap();
    assert_eq!(folded.unit("sum", 2, 1).unwrap(), [0.0, 0.0, 0.0, 3.5]);
    assert_eq!(folded.expert("max", 0).unwrap(), [0.0, 0.0, 7.0]);
    assert_eq!((folded.tokens(), folded.sequences(), folded.loss_tokens()), (10, 2, 8));
    assert_eq!(folded.waves().iter().copied().collect::<Vec<_>>(), [0, 4]);
    assert_eq!(folded.ids().collect::<Vec<_>>(), ["max", "sum"]);
}

#[test]
fn vectors_belong_to_their_expert() {
    let mut statistics = Statistics::new(&shape(), provenance());
    statistics.begin(0);
    statistics.vector_mut("mean", Extent::Hidden, Fold::Sum, 2, 1).unwrap()[3] = 1.5;
    statistics.allocate("gram", ArrayKind::Vector(Extent::Experts), Fold::Sum).unwrap();
    assert_eq!(statistics.vector("mean", Extent::Hidden, 2, 1).unwrap(), [0.0, 0.0, 0.0, 1.5]);
    assert_eq!(statistics.vector("mean", Extent::Hidden, 2, 2).unwrap(), [0.0; 4]);
    assert_eq!(statistics.vector("gram", Extent::Experts, 0, 2).unwrap(), [0.0; 3]);
    assert_eq!(statistics.kind("mean").unwrap(), ArrayKind::Vector(Extent::Hidden));
    assert!(matches!(statistics.vector("mean", Extent::Experts, 2, 1), Err(Error::StatisticKind { .. })));
    assert!(matches!(
        statistics.vector("mean", Extent::Hidden, 2, 3),
        Err(Error::UnknownExpert { expert: 3, count: 3, .. })
    ));
    assert!(matches!(statistics.allocate("m", ArrayKind::Unit, Fold::Moments), Err(Error::StatisticKind { .. })));
    statistics.vector_mut("mean", Extent::Hidden, Fold::Sum, 2, 1).unwrap()[2] = f64::NAN;
    let message = statistics.save(tempdir().unwrap().path().join("s")).unwrap_err().to_string();
    assert!(message.contains("element 2 of statistic `mean` of layer 2, expert 1"), "{message}");
}

#[test]
fn files_of_version_1_still_load() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("statistics.safetensors");
    let mut statistics = Statistics::new(&shape(), provenance());
    statistics.begin(4);
    statistics.unit_mut("fisher", Fold::Sum, 2, 1).unwrap()[0] = 0.5;
    statistics.expert_mut("peak", Fold::Max, 0).unwrap()[1] = 2.0;
    statistics.save(&path).unwrap();
    // Units and experts are written as before, so that the version alone tells such a file from an old one.
    let (new, mut old) = (br#"\"version\":3"#, fs::read(&path).unwrap());
    let at = old.windows(new.len()).position(|w| w == new).unwrap();
    old[at + new.len() - 1] = b'1';
    fs::write(&path, old).unwrap();
    assert_eq!(Statistics::load(&path).unwrap(), statistics);
}

#[test]
fn an_overlap_changes_nothing() {
    let mut folded = wave(1, 0);
    folded.fold(&wave(2, 0)).unwrap();
    let before = folded.clone();
    let error = folded.fold(&wave(2, 0)).unwrap_err();
    assert!(matches!(&error, Error::WaveOverlap { waves, .. } if *waves == [2]), "{error}");
    assert_eq!(folded, before);
}

#[test]
fn other_shape_provenance_or_arrays_are_refused() {
    let mut folded = wave(1, 0);
    let foreign = Statistics::new(&shape(), Provenance::new("other", "data", provenance().recipe));
    assert!(matches!(folded.fold(&foreign), Err(Error::ProvenanceMismatch { field: "model fingerprint", .. })));
    let narrow = MoeShape { hidden_size: 8, ..shape() };
    assert!(matches!(folded.fold(&Statistics::new(&narrow, provenance())), Err(Error::InvalidShape { .. })));
    let mut fewer = Statistics::new(&shape(), provenance());
    fewer.begin(9);
    assert!(matches!(folded.fold(&fewer), Err(Error::StatisticsDiffer { .. })));
}

#[test]
fn lookups_are_checked() {
    let mut statistics = wave(0, 0);
    assert!(matches!(statistics.unit("fisher", 1, 0), Err(Error::UnknownLayer { layer: 1, .. })));
    assert!(matches!(statistics.unit("fisher", 0, 3), Err(Error::UnknownExpert { expert: 3, count: 3, .. })));
    assert!(matches!(statistics.unit("fisher", 0, usize::MAX), Err(Error::UnknownExpert { .. })));
    assert!(matches!(statistics.unit("taylor", 0, 0), Err(Error::UnknownStatistic { .. })));
    assert!(matches!(statistics.expert("fisher", 0), Err(Error::StatisticKind { .. })));
    assert!(matches!(statistics.unit_mut("fisher", Fold::Max, 0, 0), Err(Error::StatisticKind { .. })));
    assert!(matches!(statistics.expert_mut("fisher", Fold::Sum, 0), Err(Error::StatisticKind { .. })));
    assert_eq!(statistics.unit("fisher", 0, 1).unwrap(), [0.0f64; 0]);
}

#[test]
fn values_that_are_no_numbers_are_refused_with_their_place() {
    let directory = tempdir().unwrap();
    let mut statistics = wave(0, 0);
    statistics.unit_mut("fisher", Fold::Sum, 2, 1).unwrap()[2] = f64::NAN;
    let message = statistics.save(directory.path().join("s")).unwrap_err().to_string();
    assert!(message.contains("`fisher` of layer 2, expert 1, unit 2"), "{message}");
    // Too large for f32: fine in a folded file, not in a wave file.
    statistics.unit_mut("fisher", Fold::Sum, 2, 1).unwrap()[2] = 1e300;
    statistics.save(directory.path().join("s")).unwrap();
    assert!(matches!(store(&directory.path().join("store")).write(&statistics), Err(Error::NonFinite { .. })));
}

#[test]
fn a_store_resumes_and_ignores_what_a_killed_process_left() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("store");
    let mut first = store(&path);
    first.write(&wave(0, 5)).unwrap();
    first.write(&wave(7, 5)).unwrap();
    drop(first);
    let leftover = path.join(".wave-000003.safetensors.1-0.tmp");
    fs::write(&leftover, b"half").unwrap();
    fs::write(path.join("notes.txt"), b"the user's").unwrap();
    assert_eq!(StatisticsStore::open(&path).unwrap().waves().len(), 2);
    let mut resumed = store(&path);
    assert!(!leftover.exists() && path.join("notes.txt").exists());
    assert_eq!(resumed.waves().iter().copied().collect::<Vec<_>>(), [0, 7]);
    assert!(matches!(resumed.write(&wave(7, 5)), Err(Error::WaveOverlap { .. })));
    resumed.write(&wave(3, 5)).unwrap();
    let mut through = store(&directory.path().join("through"));
    for id in [0, 3, 7] {
        through.write(&wave(id, 5)).unwrap();
    }
    assert_eq!(resumed.fold().unwrap(), through.fold().unwrap());
}

#[test]
fn a_store_refuses_what_is_not_its_own() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("store");
    let mut own = store(&path);
    own.write(&wave(0, 0)).unwrap();
    let other = Provenance { data: "other data".into(), ..provenance() };
    let error = StatisticsStore::create_or_resume(&path, &shape(), &other).unwrap_err().to_string();
    assert!(error.contains("data hash is `data`, expected `other data`"), "{error}");
    let narrow = MoeShape { hidden_size: 2, ..shape() };
    assert!(matches!(
        StatisticsStore::create_or_resume(&path, &narrow, &provenance()),
        Err(Error::InvalidShape { .. })
    ));
    let foreign = directory.path().join("foreign");
    StatisticsStore::create_or_resume(&foreign, &shape(), &other).unwrap();
    assert!(matches!(own.absorb(&foreign), Err(Error::ProvenanceMismatch { .. })));
    assert!(matches!(own.absorb(&path), Err(Error::WaveOverlap { .. })));
    let mut both = wave(1, 0);
    both.fold(&wave(2, 0)).unwrap();
    assert!(own.write(&both).unwrap_err().to_string().contains("one wave at a time"));
    // A wave file under another wave's name.
    fs::rename(path.join("wave-000000.safetensors"), path.join("wave-000001.safetensors")).unwrap();
    assert!(StatisticsStore::open(&path).unwrap().fold().unwrap_err().to_string().contains("expected 1"));
    // A directory of wave files without store.json is nobody's collection.
    fs::remove_file(path.join("store.json")).unwrap();
    assert!(StatisticsStore::create_or_resume(&path, &shape(), &provenance()).is_err());
}

#[test]
fn a_refused_absorb_copies_nothing() {
    let directory = tempdir().unwrap();
    let mut own = store(&directory.path().join("own"));
    let other_path = directory.path().join("other");
    let mut other = store(&other_path);
    for id in 0..3 {
        other.write(&wave(id, 0)).unwrap();
    }
    let file = other_path.join("wave-000002.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 4]).unwrap();
    assert!(matches!(own.absorb(&other_path), Err(Error::MalformedArtifact { .. })));
    assert!(own.waves().is_empty());
    assert!(StatisticsStore::open(own.directory()).unwrap().waves().is_empty());
}

#[test]
fn newer_versions_and_other_files_are_told_apart() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("store");
    store(&path);
    let json = fs::read_to_string(path.join("store.json")).unwrap();
    fs::write(path.join("store.json"), json.replace("\"version\": 1", "\"version\": 2")).unwrap();
    assert!(matches!(StatisticsStore::open(&path), Err(Error::ArtifactVersion { found: 2, supported: 1, .. })));
    fs::write(path.join("store.json"), "{}").unwrap();
    assert!(matches!(StatisticsStore::open(&path), Err(Error::MalformedArtifact { .. })));
    assert!(matches!(StatisticsStore::open(directory.path().join("absent")), Err(Error::Io { .. })));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/tf5/qwen3_moe/model.safetensors");
    let error = Statistics::load(model).unwrap_err().to_string();
    assert!(error.contains("moe.statistics"), "{error}");
}

#[test]
fn matrices_belong_to_the_model_and_samples_keep_the_lowest_rows() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("statistics.safetensors");
    let mut statistics = wave(3, 1);
    statistics.save(&path).unwrap();
    assert_eq!(Statistics::load(&path).unwrap(), statistics);
    let (sample, columns) = statistics.matrix("sample").unwrap();
    assert_eq!((sample.len(), columns), (12, 4));
    statistics.fold(&wave(7, 1)).unwrap();
    statistics.fold(&wave(2, 1)).unwrap();
    let (sample, _) = statistics.matrix("sample").unwrap();
    let keys: Vec<[f64; 3]> = sample.chunks_exact(4).map(|row| [row[0], row[1], row[2]]).collect();
    // Of rows 10, 4, 9 (wave 3), 5, 10, 4 (wave 7) and 3, 8 (wave 2).
    assert_eq!(keys.iter().map(|key| key[0]).collect::<Vec<_>>(), [3.0, 4.0, 4.0, 5.0, 8.0]);
    assert_eq!([keys[1][1], keys[2][1]], [3.0, 7.0], "the next number of the key decides");

    for (error, part) in [
        (statistics.matrix("routed").err(), "value per expert"),
        (statistics.matrix("nothing").err(), "nothing"),
        (statistics.matrix_mut("covariance", [2, 2], Fold::Sum).err(), "a matrix [2, 2]"),
        (statistics.matrix_mut("other", [2, 2], Fold::Lowest { key: 1 }).err(), "fixed size"),
        (statistics.add_rows("sample", [5, 4], 3, &[0.0; 5]).err(), "rows of 4"),
        (statistics.add_rows("other", [5, 4], 5, &[]).err(), "a fold of that kind"),
    ] {
        let error = error.unwrap().to_string();
        assert!(error.contains(part), "{error}: {part}");
    }
    statistics.matrix_mut("covariance", [3, 2], Fold::Sum).unwrap()[5] = f64::NAN;
    let error = statistics.save(&path).unwrap_err().to_string();
    assert!(error.contains("statistic `covariance`: row 2, column 1 is NaN"), "{error}");
}

#[test]
fn a_store_that_is_written_to_is_locked_and_may_be_read() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("store");
    let mut first = store(&path);
    first.write(&wave(0, 5)).unwrap();
    let busy = StatisticsStore::create_or_resume(&path, &shape(), &provenance()).unwrap_err();
    assert!(matches!(busy, Error::OutputBusy { .. }), "{busy}");
    assert!(busy.to_string().contains("another process is writing"), "{busy}");
    assert_eq!(StatisticsStore::open(&path).unwrap().waves().len(), 1);
    drop(first);
    assert_eq!(store(&path).waves().len(), 1);
}

#[test]
fn a_group_has_one_store_or_one_on_every_disk() {
    let directory = tempdir().unwrap();
    for (name, disks) in [("shared", 1), ("two", 2), ("own", 3)] {
        let at = |rank: usize| directory.path().join(format!("{name}-{}", rank % disks));
        let all = Threads::run(3, |group| {
            let mut store = StatisticsStore::join(group, at(group.rank()), &shape(), &provenance()).unwrap();
            store.write(&wave(group.rank() as u64, 7)).unwrap();
            group.check(None).unwrap();
            // another run, while this one is at it
            let busy = StatisticsStore::create_or_resume(at(group.rank()), &shape(), &provenance()).is_err();
            group.check(None).unwrap();
            busy
        });
        assert_eq!(all, [true; 3], "{name}");
        let held: Vec<usize> = (0..disks).map(|disk| StatisticsStore::open(at(disk)).unwrap().waves().len()).collect();
        assert_eq!((held.len(), held.iter().sum::<usize>()), (disks, 3), "{name}: {held:?}");
        for entry in fs::read_dir(at(0)).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            assert!(!file.contains("group"), "{file}");
        }
    }
    let other = Provenance::new("model", "other", "{}");
    let all = Threads::run(2, |group| {
        let provenance = if group.rank() == 1 { &other } else { &provenance() };
        let joined = StatisticsStore::join(group, directory.path().join("mixed"), &shape(), provenance);
        let group: &dyn Group = group;
        group.agree(joined).unwrap_err().to_string()
    });
    assert!(all.iter().all(|error| error.contains("data hash is `data`, expected `other`")), "{all:?}");
}

#[test]
fn messages_of_slices_that_are_none_are_refused() {
    let message = wave(0, 1).slice(0, 2).to_message(false).unwrap();
    let read = |message: &[u8]| StatisticsSlice::from_message(&shape(), provenance(), message);
    assert!(read(&message).is_ok());
    let longer = [message.clone(), vec![0]].concat();
    for bad in [&message[..message.len() - 1], &message[..20], &[], &longer, &[255; 9]] {
        let error = read(bad).unwrap_err().to_string();
        assert!(error.contains("a slice of statistics from another rank"), "{error}");
    }
    let different = vec![wave(0, 1).slice(0, 2), wave(1, 1).slice(1, 2)];
    assert!(StatisticsSlice::whole(different).unwrap_err().to_string().contains("found waves {1}"));
}
