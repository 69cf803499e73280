use std::cell::RefCell;
use std::fs;

use super::*;
use crate::data::Batch;
use crate::data::fixtures::{BYTES, Bytes, one, optional_strings, pairs, recipe, source, strings, write};
use crate::recipe::DataFormat;

impl Room {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self, sources: &[DataSource], more: &str, seed: u64) -> Result<Dataset> {
        Dataset::open(sources, &recipe(more), &BYTES, &self.file("cache"), seed, &|_, _| {})
    }
}

impl Encode for NoTemplate {
    fn encode(&self, _: &Example) -> std::result::Result<crate::data::Encoded, BadRow> {
        Err(BadRow::Malformed("no template".into()))
    }

    fn fingerprint(&self) -> String {
        "no template".into()
    }

    fn check(&self, format: DataFormat) -> Result<()> {
        match format {
            DataFormat::Messages => Err(Error::Data(Fault::new("dataset.chat_template", "there is none"))),
            _ => Ok(()),
        }
    }
}

struct Room {
    folder: tempfile::TempDir,
}

fn numbers(tensor: &tch::Tensor) -> Vec<i64> {
    Vec::<i64>::try_from(tensor).unwrap()
}

/// Ids, positions, offsets, rows, targets; and where they come from.
fn flat(batch: &Batch) -> ([Vec<i64>; 5], Vec<RowId>) {
    let [ids, positions, rows, targets] = [&batch.ids, &batch.positions, &batch.rows, &batch.targets].map(numbers);
    ([ids, positions, batch.documents.offsets.clone(), rows, targets], batch.origins.clone())
}

fn epoch(dataset: &Dataset, number: u64, size: u64) -> Vec<Batch> {
    let count = dataset.micro_batches_in_epoch(number, size) as usize;
    let start = Cursor { epoch: number, micro_batch: 0 };
    let (batches, cursors): (Vec<_>, Vec<_>) = dataset.batches(start, size).take(count).map(Result::unwrap).unzip();
    assert_eq!(cursors[count - 1], Cursor { epoch: number + 1, micro_batch: 0 });
    batches
}

#[test]
fn a_batch_lays_documents_end_to_end() {
    let room = Room::new();
    let path = room.file("data.parquet");
    write(&path, vec![("prompt", strings(&["ab", "x"])), ("completion", strings(&["cd", "yz"]))]);
    let dataset = room.open(&one(path), "shuffle: false", 1).unwrap();
    let (batch, after) = dataset.batches(Cursor::default(), 8).next().unwrap().unwrap();
    let ([ids, positions, offsets, rows, targets], origins) = flat(&batch);
    assert_eq!(ids, b"abcdxyz".map(i64::from));
    assert_eq!(positions, [0, 1, 2, 3, 0, 1, 2]);
    assert_eq!(offsets, [0, 4, 7]);
    assert_eq!(rows, [1, 2, 4, 5]);
    assert_eq!(targets, b"cdyz".map(i64::from));
    assert_eq!(origins, [RowId { file: 0, row: 0 }, RowId { file: 0, row: 1 }]);
    assert_eq!(after, Cursor { epoch: 1, micro_batch: 0 });
}

#[test]
fn trained_tokens_do_not_depend_on_packing_or_batch_size() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 700);
    for more in ["packing: true", "packing: false", "packing: true\nshuffle: false"] {
        let dataset = room.open(&one(path.clone()), more, 3).unwrap();
        for size in [1, 3, 8] {
            for number in [0, 1] {
                let batches = epoch(&dataset, number, size);
                let trained: usize = batches.iter().map(|batch| batch.targets.numel()).sum();
                assert_eq!(trained as u64, dataset.report().trained_tokens, "{more}, size {size}");
                let mut origins: Vec<RowId> = batches.iter().flat_map(|batch| batch.origins.clone()).collect();
                origins.sort_unstable();
                assert!(origins.into_iter().map(|id| id.row).eq(0..700));
            }
        }
        let evaluated: Vec<Batch> = dataset.eval_batches(4).map(|item| item.unwrap().0).collect();
        assert_eq!(
            evaluated.iter().map(|batch| batch.targets.numel() as u64).sum::<u64>(),
            dataset.report().trained_tokens
        );
        assert!(evaluated.iter().flat_map(|batch| &batch.origins).map(|id| id.row).eq(0..700));
    }
}

#[test]
fn batches_from_any_cursor_are_the_tail_of_the_run() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 211);
    let weighted = DataSource { weight: 1.5, ..source(&path) };
    for more in ["packing: true", "packing: false"] {
        let dataset = room.open(std::slice::from_ref(&weighted), more, 9).unwrap();
        let whole: Vec<_> = dataset.batches(Cursor::default(), 4).take(120).map(Result::unwrap).collect();
        assert!(whole.last().unwrap().1.epoch >= 1);
        let again = room.open(std::slice::from_ref(&weighted), more, 9).unwrap();
        for at in [0, 1, 17, 40, 79, 118] {
            let tail = again.batches(whole[at].1, 4).take(3);
            for ((batch, cursor), item) in whole[at + 1..].iter().zip(tail) {
                let (found, after) = item.unwrap();
                assert_eq!((flat(&found), after), (flat(batch), *cursor), "{more}, from {at}");
            }
        }
    }
}

#[test]
fn the_largest_micro_batch_is_the_largest_that_comes() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 211);
    for more in ["packing: true", "packing: false"] {
        let dataset = room.open(&one(path.clone()), more, 9).unwrap();
        let sizes = |count| {
            let batches = dataset.batches(Cursor::default(), 4).take(count).map(|item| item.unwrap().0);
            let size = |batch: Batch| {
                let documents = batch.documents.offsets.len() as u64 - 1;
                (batch.ids.numel() as u64, batch.rows.numel() as u64, documents)
            };
            batches.map(size).collect::<Vec<_>>()
        };
        // Within a pass, and over the end of one.
        for count in [1, 2, 5, 60, 130] {
            let sizes = sizes(count);
            let found = dataset.largest_micro_batch(4, count as u64);
            assert_eq!(found.tokens, sizes.iter().map(|size| size.0).max().unwrap(), "{more}, {count}");
            assert_eq!(found.trained, sizes.iter().map(|size| size.1).max().unwrap(), "{more}, {count}");
            assert_eq!(found.documents, sizes.iter().map(|size| size.2).max().unwrap(), "{more}, {count}");
        }
    }
}

#[test]
fn a_cursor_beyond_the_epoch_is_refused() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 10);
    let dataset = room.open(&one(path), "", 9).unwrap();
    let mut at_the_end = dataset.batches(Cursor { epoch: 0, micro_batch: 5 }, 2);
    assert_eq!(at_the_end.next().unwrap().unwrap().1, Cursor { epoch: 1, micro_batch: 1 });
    let mut beyond = dataset.batches(Cursor { epoch: 0, micro_batch: 6 }, 2);
    assert!(matches!(beyond.next(), Some(Err(Error::State(_)))));
    assert!(beyond.next().is_none());
}

#[test]
fn bad_rows_stop_the_run_or_are_counted_and_named() {
    let room = Room::new();
    let path = room.file("data.parquet");
    let long = "x".repeat(100);
    write(
        &path,
        vec![
            ("prompt", optional_strings(&[Some("p"), Some("p"), None, Some("p"), Some(""), Some(""), Some("p")])),
            (
                "completion",
                optional_strings(&[Some("ok"), Some(&long), Some("c"), Some("panic"), Some("1"), Some(""), Some("ok")]),
            ),
        ],
    );
    let stopped = room.open(&one(path.clone()), "", 1).unwrap_err();
    assert_eq!(stopped.exit_code(), 4);
    assert!(stopped.to_string().contains("data.parquet, row 2: column `prompt` is null"), "{stopped}");
    assert!(stopped.to_string().contains("on_bad_row: skip"), "{stopped}");
    let strict = room.open(&one(path.clone()), "overlong: error\non_bad_row: skip", 1).unwrap_err().to_string();
    assert!(strict.contains("row 1: 101 tokens, more than max_length 64"), "{strict}");

    let dataset = room.open(&one(path.clone()), "on_bad_row: skip", 1).unwrap();
    let report = dataset.report();
    assert_eq!((report.rows, report.documents, report.dropped()), (7, 2, 5));
    let counts = [&report.overlong, &report.malformed, &report.nothing_trained, &report.empty].map(|tally| tally.count);
    assert_eq!(counts, [1, 2, 1, 1]);
    assert!(report.malformed.first[1].place.ends_with("data.parquet, row 3"));
    assert!(report.malformed.first[1].what.contains("asked to panic"));
    let screen = report.to_string();
    assert!(
        screen.contains("2 row(s) left out, malformed:") && screen.contains("row 2: column `prompt` is null"),
        "{screen}"
    );
    assert_eq!(dataset.documents_at(RowId { file: 0, row: 1 }).unwrap(), []);
    let kept: Vec<u64> = (0..9).filter(|row| dataset.keeps(RowId { file: 0, row: *row })).collect();
    assert_eq!(kept, [0, 6]);
    assert!(!dataset.keeps(RowId { file: 1, row: 0 }));
    assert_eq!(dataset.documents_at(RowId { file: 0, row: 6 }).unwrap()[0].ids.len(), 3);

    // The cache now holds what a stricter recipe does not let pass.
    let stopped = room.open(&one(path), "on_bad_row: error", 1).unwrap_err().to_string();
    assert!(stopped.contains("row 2: column `prompt` is null"), "{stopped}");
}

#[test]
fn nothing_left_to_train_on_is_an_error() {
    let room = Room::new();
    let path = room.file("data.parquet");
    write(&path, vec![("prompt", strings(&["p"; 3])), ("completion", strings(&["long".repeat(50).as_str(); 3]))]);
    let said = room.open(&one(path.clone()), "", 1).unwrap_err().to_string();
    assert!(
        said.contains("none of the 3 rows is left to train on") && said.contains("longer than max_length"),
        "{said}"
    );
    let none = DataSource { weight: 0.0, ..source(&path) };
    write(&path, vec![("text", strings(&["some text"]))]);
    assert!(room.open(&[none], "", 1).unwrap_err().to_string().contains("weight 0"));
}

#[test]
fn truncated_rows_are_counted_and_one_without_its_answer_is_bad() {
    let room = Room::new();
    let path = room.file("data.parquet");
    let (short, long) = ("p".repeat(60), "p".repeat(70));
    write(&path, vec![("prompt", strings(&[&short, &long])), ("completion", strings(&["completion"; 2]))]);
    let encoder = Bytes { truncate: true, ..BYTES };
    let recipe = recipe("overlong: truncate\non_bad_row: skip");
    let dataset = Dataset::open(&one(path), &recipe, &encoder, &room.file("cache"), 1, &|_, _| {}).unwrap();
    assert_eq!((dataset.report().answer_cut.count, dataset.report().nothing_trained.count), (1, 1));
    assert!(dataset.report().to_string().contains("no row's answer is whole"), "{}", dataset.report());
    assert_eq!(dataset.report().trained_tokens, 4);
}

#[test]
fn long_text_is_split_and_nothing_is_lost() {
    let room = Room::new();
    let path = room.file("data.parquet");
    write(&path, vec![("text", strings(&[&"t".repeat(150), "short"]))]);
    let dataset = room.open(&one(path), "packing: true", 1).unwrap();
    assert_eq!((dataset.report().documents, dataset.report().tokens), (4, 155));
    assert_eq!(dataset.documents_at(RowId { file: 0, row: 0 }).unwrap().len(), 3);
    assert_eq!(dataset.report().bins, Some(3));
}

#[test]
fn a_second_start_reads_the_cache_and_damage_is_rebuilt() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 300);
    let refusing = Bytes { name: "bytes", limit: 64, truncate: false };
    let first = room.open(&one(path.clone()), "", 1).unwrap();
    let calls = RefCell::new(Vec::new());
    let open = |encoder: &dyn Encode| {
        Dataset::open(&one(path.clone()), &recipe(""), encoder, &room.file("cache"), 1, &|done, all| {
            calls.borrow_mut().push((done, all));
        })
        .unwrap()
    };
    let second = open(&refusing);
    assert_eq!(calls.take(), [(300, 300)]);
    assert_eq!(second.report(), first.report());
    assert_eq!(second.fingerprint(), first.fingerprint());
    let folder = second.shelf.files[0].folder().to_path_buf();
    for name in ["documents.bin", "index.bin", "summary.json"] {
        let whole = fs::read(folder.join(name)).unwrap();
        for damage in ["flip", "cut", "gone"] {
            match damage {
                "flip" => {
                    let mut bytes = whole.clone();
                    bytes[whole.len() / 2] ^= 0x80;
                    fs::write(folder.join(name), bytes).unwrap();
                }
                "cut" => fs::write(folder.join(name), &whole[..whole.len() / 2]).unwrap(),
                _ => fs::remove_file(folder.join(name)).unwrap(),
            }
            let rebuilt = open(&BYTES);
            let notices = &rebuilt.report().notices;
            assert!(notices.len() == 1 && notices[0].contains("damaged"), "{name} {damage}: {notices:?}");
            assert_eq!(rebuilt.fingerprint(), first.fingerprint());
            assert!(open(&BYTES).report().notices.is_empty());
        }
    }
    // Damage after the start, where a large cache is not checked whole.
    let dataset = open(&BYTES);
    let mut bytes = fs::read(folder.join("documents.bin")).unwrap();
    bytes[40] ^= 1;
    fs::write(folder.join("documents.bin"), bytes).unwrap();
    let error = dataset.batches(Cursor::default(), 8).find_map(Result::err).unwrap().to_string();
    assert!(error.contains("token cache is damaged"), "{error}");
    assert!(!open(&BYTES).report().notices.is_empty());
}

#[test]
fn another_fingerprint_tells_other_data() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 40);
    let print =
        |more: &str, weight| room.open(&[DataSource { weight, ..source(&path) }], more, 1).unwrap().fingerprint();
    let base = print("", 1.0);
    assert_eq!(base, print("packing: true", 1.0));
    assert_ne!(base, print("", 2.0));
    assert_ne!(base, print("limit: 39", 1.0));
    // The same rows under another name are the same data.
    let moved = room.file("moved.parquet");
    fs::copy(&path, &moved).unwrap();
    assert_eq!(base, room.open(&one(moved), "", 1).unwrap().fingerprint());
    pairs(&path, 41);
    assert_ne!(base, print("", 1.0));
}

#[test]
fn two_runs_at_once_make_one_cache() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 2000);
    let prints: Vec<String> = std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..4).map(|_| scope.spawn(|| room.open(&one(path.clone()), "", 1).unwrap().fingerprint())).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert!(prints.iter().all(|print| *print == prints[0]));
    let kept = fs::read_dir(room.file("cache/datasets"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(kept.into_iter().all(|name| !name.ends_with("building")));
}

/// Conversations without a chat template, say.
struct NoTemplate;

#[test]
fn what_no_row_can_mend_is_said_before_the_first_row() {
    let room = Room::new();
    let path = room.file("data.parquet");
    write(&path, vec![("messages", strings(&["[]"]))]);
    let open =
        |more: &str| Dataset::open(&one(path.clone()), &recipe(more), &NoTemplate, &room.file("cache"), 1, &|_, _| {});
    assert_eq!(open("").unwrap_err().to_string(), "dataset.chat_template: there is none");
    assert!(open("columns: {text: messages}").unwrap_err().to_string().contains("no template"));
}

#[test]
fn a_cache_that_cannot_be_written_says_how_to_move_it() {
    let room = Room::new();
    let path = room.file("data.parquet");
    pairs(&path, 3);
    fs::write(room.file("cache"), "a file").unwrap();
    let error = room.open(&one(path), "", 1).unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains("ENGRAFT_CACHE"), "{error}");
}
