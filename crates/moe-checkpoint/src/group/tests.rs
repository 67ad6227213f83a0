use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;

#[test]
fn messages_reach_whom_they_are_for_whatever_their_lengths() {
    for size in 1..=5 {
        let all = Threads::run(size, |group| {
            let mut rounds = Vec::new();
            for round in 0..20 {
                let to = (0..size).map(|to| vec![group.rank() as u8; (round * (to + 1) + group.rank()) % 7]).collect();
                rounds.push(group.exchange(to).unwrap());
            }
            rounds
        });
        for (to, rounds) in all.iter().enumerate() {
            for (round, received) in rounds.iter().enumerate() {
                for (from, message) in received.iter().enumerate() {
                    assert_eq!(*message, vec![from as u8; (round * (to + 1) + from) % 7], "{from} to {to}, {round}");
                }
            }
        }
    }
}

#[test]
fn the_root_gathers_and_tells_all() {
    let all = Threads::run(3, |group| {
        let own = vec![group.rank() as u8; group.rank()];
        (group.gather(2, own.clone()).unwrap(), group.broadcast(1, own.clone()).unwrap())
    });
    for (rank, (gathered, told)) in all.into_iter().enumerate() {
        let expected = if rank == 2 { vec![vec![], vec![1], vec![2, 2]] } else { vec![] };
        assert_eq!((gathered, told), (expected, vec![1]));
    }
    assert_eq!(Alone.gather(0, vec![7]).unwrap(), [[7]]);
    assert_eq!(Alone.broadcast(0, vec![7]).unwrap(), [7]);
    let outside = Alone.broadcast(1, vec![7]).unwrap_err().to_string();
    assert!(outside.contains("found rank 1, expected one below 1"), "{outside}");
    let few = Alone.exchange(vec![]).unwrap_err().to_string();
    assert!(few.contains("found 0 messages, expected one to each of 1"), "{few}");
}

#[test]
fn a_failure_of_one_rank_stops_all_with_its_message_whatever_they_are_doing() {
    let finished = AtomicUsize::new(0);
    let all = Threads::run(4, |group| {
        let work = || -> Result<()> {
            group.check(None)?;
            if group.rank() == 2 {
                return Err(Error::Group("the disk is full".into()));
            }
            group.exchange(vec![vec![1]; 4])?;
            group.check(None)?;
            finished.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let group: &dyn Group = group;
        let error = group.agree(work()).unwrap_err().to_string();
        // later calls fail at once
        let later = group.exchange(vec![vec![]; 4]).unwrap_err().to_string();
        (error, later, group.failed())
    });
    assert_eq!(finished.into_inner(), 0);
    for (rank, (error, later, failed)) in all.into_iter().enumerate() {
        assert!(error.contains("the disk is full") && later.contains("rank 2: "), "{error}; {later}");
        assert_eq!((error.starts_with("rank 2: "), failed), (rank != 2, Some(2)), "{error}");
    }
}

#[test]
fn nobody_waits_for_a_rank_that_has_ended() {
    let all = Threads::run(3, |group| match group.rank() {
        1 => None,
        _ => Some(group.exchange(vec![vec![]; 3]).unwrap_err().to_string()),
    });
    let expected = Some("rank 1: ended before the others".to_string());
    assert_eq!(all, [expected.clone(), None, expected]);
}

#[test]
fn ranks_that_make_different_calls_are_told() {
    let all = Threads::run(2, |group| match group.rank() {
        0 => group.check(None).unwrap_err().to_string(),
        _ => group.exchange(vec![vec![]; 2]).unwrap_err().to_string(),
    });
    assert!(all.iter().all(|error| error.contains("rank 1: makes the call Exchange while rank 0")), "{all:?}");
}

#[test]
fn what_has_to_be_the_same_is_named_where_it_is_not() {
    let all = Threads::run(3, |group| {
        let group: &dyn Group = group;
        group.same("model", "a").unwrap();
        group.same("data", if group.rank() == 1 { "b" } else { "a" }).unwrap_err().to_string()
    });
    assert!(all.iter().all(|e| e.ends_with("data: found b on rank 1, expected that of rank 0, a")), "{all:?}");
}

#[test]
fn what_was_dealt_out_comes_back_in_order() {
    for (size, items) in [(1, 3), (3, 7), (4, 2), (2, 0)] {
        let all = Threads::run(size, |group| {
            let group: &dyn Group = group;
            let own = (0..items as u8).skip(group.rank()).step_by(size).map(|item| vec![item; 3]).collect();
            let shared = group.share_dealt(own, items).unwrap();
            let more = group.share_dealt(vec![vec![]; items + 1], items).unwrap_err().to_string();
            assert!(more.contains("done by rank 0, expected"), "{more}");
            shared
        });
        let expected: Vec<Vec<u8>> = (0..items as u8).map(|item| vec![item; 3]).collect();
        assert!(all.iter().all(|shared| *shared == expected), "{size} ranks, {items} items");
    }
}

#[test]
fn launchers_are_known_by_what_they_set() {
    let of = |set: &[(&str, &str)]| {
        let set: Vec<(String, String)> = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        launched(move |name| set.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
    };
    assert_eq!(of(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")]).unwrap(), None, "a batch script is no step");
    let slurm = [("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "3")];
    assert_eq!(of(&slurm).unwrap(), Some(Launch { launcher: "Slurm", rank: 3, size: 4 }));
    let inside = [slurm[0], slurm[1], ("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
    assert_eq!(of(&inside).unwrap(), Some(Launch { launcher: "Open MPI", rank: 1, size: 2 }));
    let bad = of(&[("PMI_RANK", "x"), ("PMI_SIZE", "2")]).unwrap_err().to_string();
    assert!(bad.contains("found PMI_RANK=x and PMI_SIZE=2"), "{bad}");
}

proptest! {
    #[test]
    fn messages_are_packed_into_one(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..5)) {
        let packed = pack(messages.iter().map(Vec::as_slice));
        prop_assert_eq!(unpack(&packed).unwrap(), messages);
        if !packed.is_empty() {
            prop_assert!(unpack(&packed[..packed.len() - 1]).is_err());
        }
    }

    #[test]
    fn everyone_has_what_everyone_shares(
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 1..5),
    ) {
        let all = Threads::run(messages.len(), |group| {
            let group: &dyn Group = group;
            group.share(messages[group.rank()].clone()).unwrap()
        });
        prop_assert!(all.iter().all(|shared| *shared == messages));
    }
}
