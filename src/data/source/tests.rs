use std::fs;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, FixedSizeListArray, Int32Array, LargeListArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field};
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;
use crate::data::fixtures::{message_lists, one, pairs, recipe, strings, write, write_with};
use crate::data::{Example, RowId, SourceFiles};

fn refusal(path: &Path) -> String {
    match ParquetFile::open(path) {
        Err(Error::Data(fault)) => fault.to_string(),
        other => panic!("{other:?}"),
    }
}

fn read_all(path: &Path) -> Result<Vec<Example>> {
    let sources = SourceFiles::open(&one(path.to_path_buf()), &recipe(""))?;
    sources.examples(u64::MAX).map(|row| row?.1.map_err(|bad| Error::Data(Fault::at(path, bad)))).collect()
}

#[test]
fn what_is_not_parquet_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    let cases: [(&[u8], &str); 9] = [
        (b"", "is empty"),
        (b"prompt,completion\nhi,there\n", "CSV"),
        (b"[{\"text\": \"hi\"}]", "JSON"),
        (b"\xef\xbb\xbf  {\"text\": \"hi\"}", "JSON"),
        (b"ARROW1\0\0", "Arrow IPC"),
        (b"\x80\x04\x95\x10", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b"PAR1 but no end", "truncated"),
    ];
    for (bytes, named) in cases {
        fs::write(&path, bytes).unwrap();
        let said = refusal(&path);
        assert!(said.contains(named) && said.contains("data.parquet"), "{said}");
    }
    assert!(refusal(folder.path()).contains("a folder"));
    assert!(refusal(Path::new("/dev/zero")).contains("not a regular file"));
    assert!(refusal(&folder.path().join("missing.parquet")).contains("No such file"));
    let fifo = folder.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(refusal(&fifo).contains("not a regular file"));
}

#[test]
fn every_truncation_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("whole.parquet");
    pairs(&path, 50);
    let bytes = fs::read(&path).unwrap();
    let cut = folder.path().join("cut.parquet");
    for length in (0..bytes.len()).step_by(13) {
        fs::write(&cut, &bytes[..length]).unwrap();
        refusal(&cut);
        // With its end put back the magic is right and the rest is not.
        fs::write(&cut, [&bytes[..length], b"PAR1"].concat()).unwrap();
        assert!(read_all(&cut).is_err(), "length {length}");
    }
}

#[test]
fn damaged_bytes_are_an_error_or_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
        Compression::LZ4_RAW,
        Compression::BROTLI(Default::default()),
    ];
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    let mut errors = 0;
    for codec in codecs {
        let messages =
            message_lists(["role", "content"], &[&[("user", Some("hello")), ("assistant", Some("hi"))][..]; 40]);
        write_with(&path, vec![("messages", messages)], codec, 30);
        let whole = fs::read(&path).unwrap();
        for _ in 0..250 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random(3) {
                let at = random(bytes.len());
                bytes[at] = if random(2) == 0 { bytes[at] ^ (1 << random(8)) } else { random(256) as u8 };
            }
            fs::write(&path, &bytes).unwrap();
            errors += usize::from(read_all(&path).is_err());
        }
    }
    assert!(errors > 500, "{errors} of 1500 noticed");
}

#[test]
fn invalid_utf8_is_one_bad_row_named_with_its_column() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    let schema = "message m { required binary prompt (STRING); required binary completion (STRING); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
    let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for bad in [None, Some(17)] {
        let mut cells = vec![ByteArray::from("fine"); 30];
        if let Some(row) = bad {
            cells[row] = ByteArray::from(vec![b'a', 0xff, 0xfe]);
        }
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&cells, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    let sources = SourceFiles::open(&one(path), &recipe("")).unwrap();
    assert_eq!(sources.files[0].parquet.columns()[1], ("completion".to_string(), "string".to_string()));
    let rows: Vec<_> = sources.examples(u64::MAX).map(Result::unwrap).collect();
    assert_eq!(rows.len(), 30);
    for (id, row) in rows {
        match row {
            Ok(_) => assert_ne!(id.row, 17),
            Err(bad) => {
                let said = bad.to_string();
                assert!(id.row == 17 && said.contains("column `completion`: the text is not valid UTF-8"), "{said}");
            }
        }
    }
}

#[test]
fn every_arrow_type_of_strings_and_lists_reads_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    let cells = strings(&["one", "two", "two"]);
    let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    for kind in [DataType::Utf8, DataType::LargeUtf8, DataType::Utf8View, DataType::Binary, dictionary] {
        write(&path, vec![("text", cast(&cells, &kind).unwrap())]);
        let texts = ["one", "two", "two"].map(|text| Example::Text(text.into()));
        assert_eq!(read_all(&path).unwrap(), texts, "{kind}");
    }
    let list = message_lists(["from", "value"], &[&[("human", Some("a")), ("gpt", Some("b"))][..]; 2]);
    let items = list.as_list::<i32>().values().clone();
    let field = Arc::new(Field::new("item", items.data_type().clone(), true));
    let offsets = arrow::buffer::OffsetBuffer::from_lengths([2, 2]);
    let large: ArrayRef = Arc::new(LargeListArray::new(field.clone(), offsets, items.clone(), None));
    let fixed: ArrayRef = Arc::new(FixedSizeListArray::new(field, 2, items, None));
    let expected = vec![
        Example::Conversation {
            messages: vec![
                serde_json::json!({"role": "user", "content": "a"}),
                serde_json::json!({"role": "assistant", "content": "b"}),
            ],
            tools: None,
            trained_from: 0,
        };
        2
    ];
    for lists in [list, large, fixed] {
        write(&path, vec![("conversations", lists)]);
        assert_eq!(read_all(&path).unwrap(), expected);
    }
}

#[test]
fn columns_that_do_not_fit_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    write(&path, vec![("question", strings(&["q"])), ("answer", strings(&["a"])), ("n", numbers)]);
    let said = |more: &str| SourceFiles::open(&one(path.clone()), &recipe(more)).unwrap_err().to_string();
    let unknown = said("");
    assert!(unknown.contains("`question` (string), `answer` (string), `n` (int32)"), "{unknown}");
    assert!(unknown.contains("columns: {prompt: question, completion: answer}"), "{unknown}");
    let steering = folder.path().join("steering.parquet");
    write(&steering, vec![("text", strings(&["t"])), ("\x1b[31m\nx", strings(&["u"]))]);
    let sources = SourceFiles::open(&one(steering), &recipe("")).unwrap();
    assert!(sources.sentences()[0].ends_with(r"not used: `\u{1b}[31m\nx`"), "{:?}", sources.sentences());
    let missing = said("columns: {prompt: question, completion: nswer}");
    assert!(missing.contains("no column `nswer`") && missing.contains("`answer`"), "{missing}");
    let mistyped = said("columns: {prompt: question, completion: n}");
    assert!(mistyped.contains("column `n` is int32, expected a string"), "{mistyped}");
    let part = said("columns: {prompt: question, completion: answer, reply: n}");
    assert!(part.contains("no part `reply`"), "{part}");
    let sources =
        SourceFiles::open(&one(path.clone()), &recipe("columns: {prompt: question, completion: answer}")).unwrap();
    assert_eq!(
        sources.sentences(),
        ["format `prompt-completion`, from dataset.columns: `question` (string), `answer` (string); not used: `n`"]
    );
}

#[test]
fn an_optional_column_of_another_type_is_not_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    for (name, found) in [("input", "int32"), ("system", "int32")] {
        let texts = [("instruction", strings(&["q"])), ("output", strings(&["a"]))];
        write(&path, texts.into_iter().chain([(name, numbers.clone())]).collect());
        let said = SourceFiles::open(&one(path.clone()), &recipe("")).unwrap_err().to_string();
        assert!(said.contains(&format!("column `{name}` is {found}, expected a string")), "{said}");
    }
    let lists = message_lists(["role", "content"], &[&[("user", Some("q")), ("assistant", Some("a"))]]);
    write(&path, vec![("instruction", strings(&["q"])), ("output", strings(&["a"])), ("input", lists)]);
    let said = SourceFiles::open(&one(path), &recipe("")).unwrap_err().to_string();
    assert!(said.contains("column `input` is list of {role, content}, expected a string"), "{said}");
}

#[test]
fn no_rows_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    write(&path, vec![("text", strings(&[]))]);
    assert!(SourceFiles::open(&one(path), &recipe("")).unwrap_err().to_string().contains("there are no rows"));
}

#[test]
fn rows_are_found_across_row_groups_and_the_limit_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    pairs(&path, 350);
    let sources = SourceFiles::open(&[one(path.clone()), one(path)].concat(), &recipe("limit: 600")).unwrap();
    let all: Vec<_> = sources.examples(u64::MAX).map(Result::unwrap).collect();
    assert_eq!(all.len(), 600);
    assert_eq!(all[599].0, RowId { file: 1, row: 249 });
    for (id, example) in [&all[0], &all[99], &all[100], &all[349], &all[350], &all[599]] {
        assert_eq!(&sources.example_at(*id).unwrap(), example);
    }
    assert!(sources.example_at(RowId { file: 1, row: 250 }).is_err());
}

#[test]
fn a_file_that_changes_or_goes_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    pairs(&path, 300);
    let sources = SourceFiles::open(&one(path.clone()), &recipe("")).unwrap();
    let mut reading = sources.examples(u64::MAX);
    assert!(reading.next().unwrap().unwrap().1.is_ok());
    pairs(&path, 299);
    let said = reading.find_map(Result::err).unwrap().to_string();
    assert!(said.contains("data.parquet") && said.contains("changed"), "{said}");
    assert!(sources.examples(1).next().unwrap().unwrap_err().to_string().contains("changed"));
    fs::remove_file(&path).unwrap();
    assert!(sources.examples(1).next().unwrap().unwrap_err().to_string().contains("has gone"));
}

#[test]
fn too_many_open_files_are_not_called_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    pairs(&path, 3);
    let file = ParquetFile::open(&path).unwrap();
    let reader = file.read(vec![0], 0).unwrap();
    let limit = io::Error::from_raw_os_error(libc::EMFILE);
    for error in [unopened(&path, "it has gone: ", &limit), reader.damaged(&limit.to_string())] {
        let said = error.to_string();
        assert!(said.contains("ulimit -n") && !said.contains("damaged") && !said.contains("gone"), "{said}");
    }
}
