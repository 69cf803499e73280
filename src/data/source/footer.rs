//! What the footer of a parquet file says, read so that damage is one bad row and not all of them.

use std::fs::File;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::basic::{ConvertedType, LogicalType};
use parquet::file::metadata::{FileMetaData, ParquetMetaData};
use parquet::schema::types::{SchemaDescriptor, Type, TypePtr};

/// The footer for reading, and the columns with the types that it gives them.
///
/// The file's own schema for arrow is passed over, so that each parquet type has one arrow type here; strings are read
/// as views into the pages, so that a dictionary of long strings is not copied out row by row.
pub(super) fn read_metadata(file: &File) -> Result<(ArrowReaderMetadata, Fields), String> {
    let text = |error: parquet::errors::ParquetError| error.to_string();
    let options = || ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let typed = ArrowReaderMetadata::load(file, options()).map_err(text)?;
    let views = |fields: &Fields| -> Fields { fields.iter().map(with_views).collect() };
    // Text is read as bytes: the decoder refuses all rows together where one is not UTF-8, here it is one bad row.
    let footer = typed.metadata().file_metadata();
    let schema = untyped_text(footer.schema_descr().root_schema_ptr()).map_err(text)?;
    let footer = FileMetaData::new(
        footer.version(),
        footer.num_rows(),
        footer.created_by().map(str::to_string),
        footer.key_value_metadata().cloned(),
        Arc::new(SchemaDescriptor::new(schema)),
        footer.column_orders().cloned(),
    );
    let metadata = Arc::new(ParquetMetaData::new(footer, typed.metadata().row_groups().to_vec()));
    let plain = ArrowReaderMetadata::try_new(metadata.clone(), options()).map_err(text)?;
    let schema = Arc::new(Schema::new_with_metadata(views(plain.schema().fields()), plain.schema().metadata().clone()));
    let reading = ArrowReaderMetadata::try_new(metadata, options().with_schema(schema)).map_err(text)?;
    Ok((reading, views(typed.schema().fields())))
}

/// A parquet type in which strings are byte arrays that promise nothing.
fn untyped_text(kind: TypePtr) -> parquet::errors::Result<TypePtr> {
    let info = kind.get_basic_info();
    let id = info.has_id().then(|| info.id());
    if kind.is_group() {
        let fields = kind.get_fields().iter().cloned().map(untyped_text).collect::<parquet::errors::Result<_>>()?;
        let group = Type::group_type_builder(kind.name())
            .with_converted_type(info.converted_type())
            .with_logical_type(info.logical_type_ref().cloned())
            .with_fields(fields)
            .with_id(id);
        let group = if info.has_repetition() { group.with_repetition(info.repetition()) } else { group };
        return group.build().map(Arc::new);
    }
    let text = matches!(info.logical_type_ref(), Some(LogicalType::String | LogicalType::Json))
        || matches!(info.converted_type(), ConvertedType::UTF8 | ConvertedType::JSON);
    if !text {
        return Ok(kind);
    }
    let bytes = Type::primitive_type_builder(kind.name(), kind.get_physical_type()).with_id(id);
    bytes.with_repetition(info.repetition()).build().map(Arc::new)
}

fn with_views(field: &FieldRef) -> FieldRef {
    let kind = match field.data_type() {
        DataType::Utf8 => DataType::Utf8View,
        DataType::Binary => DataType::BinaryView,
        DataType::List(item) => DataType::List(with_views(item)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(with_views).collect()),
        DataType::Map(entries, sorted) => DataType::Map(with_views(entries), *sorted),
        _ => return field.clone(),
    };
    Arc::new(Field::clone(field).with_data_type(kind))
}

/// Numbers the decoder takes on trust.
pub(super) fn check_counts(metadata: &ParquetMetaData) -> Result<(), String> {
    let mut rows: i64 = 0;
    for (index, group) in metadata.row_groups().iter().enumerate() {
        let wrong = |what: &str| format!("row group {index} claims {what}");
        if group.num_rows() < 0 {
            return Err(wrong(&format!("{} rows", group.num_rows())));
        }
        rows = rows.checked_add(group.num_rows()).ok_or_else(|| wrong("too many rows"))?;
        for column in group.columns() {
            let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
            if start < 0 || column.compressed_size() < 0 || column.num_values() < 0 {
                return Err(wrong("a negative offset or size"));
            }
        }
    }
    let claimed = metadata.file_metadata().num_rows();
    if rows == claimed { Ok(()) } else { Err(format!("it claims {claimed} rows, its row groups have {rows}")) }
}
