"""What each importer makes of its files: tiny tables of the public sets' form, written by hand."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog import Event, FeatureSchema, RawProduct, Rejected, User
from datasets import aihub, hm, jsonl, myntra, rent_the_runway, s3rec
from datasets.events import event_frame
from lexicon import LEXICON, Lexicon, LexiconFile
from settings import UserError
from vocab import normalise


def accepted(found):
    return [item for item in found if not isinstance(item, Rejected)]


def rejected(found):
    return [(row.file, row.line, row.reason) for row in found if isinstance(row, Rejected)]


def events(source):
    return pl.concat(accepted(source.events)).drop("event_id", "line", "list_id").sort(pl.all()).rows()


def write_lines(file: Path, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


# --- a shop's own files

PRODUCTS = [
    {
        "product_id": "p1",
        "title": "Linen shirt",
        "attributes": {"fabric": "linen", "fit": ["slim", "cropped"]},
        "price": 19,
    },
    {"product_id": 2, "title": "코트", "in_stock": False, "group_id": "coats", "arrived_at": "2024-03-01"},
]
EVENTS = [
    {"user_id": "u1", "product_id": "p1", "at": "2024-03-02T10:00:00Z", "kind": "purchase", "context": "a picnic"},
    {"user_id": "u1", "product_id": "2", "at": "2024-03-03", "event_id": "e2"},
]


@pytest.fixture
def shop(tmp_path):
    write_lines(tmp_path / "products.jsonl", PRODUCTS)
    write_lines(tmp_path / "users.jsonl", [{"user_id": "u1", "profile": {"height_cm": 170}}, {"user_id": "u2"}])
    write_lines(tmp_path / "events.jsonl", EVENTS)
    return tmp_path


def test_jsonl_columns_are_the_fields_of_the_catalogue(shop):
    source = jsonl.read(shop)
    assert list(source.products) == [RawProduct(**row) for row in PRODUCTS]
    assert list(source.users) == [User(user_id="u1", profile={"height_cm": 170}), User(user_id="u2")]
    assert (
        pl.concat(accepted(source.events)).sort("at").drop("line").equals(event_frame(Event(**row) for row in EVENTS))
    )


def test_jsonl_takes_parquet_with_structs_for_attributes_and_profiles(tmp_path):
    pl.DataFrame(
        {
            "product_id": ["p1", "p2"],
            "title": ["Linen shirt", "Coat"],
            "attributes": [{"fabric": "linen", "fit": ["slim"]}, {"fabric": None, "fit": None}],
            "price": [19.0, None],
        }
    ).write_parquet(tmp_path / "products.parquet")
    pl.DataFrame({"user_id": [1, 2], "profile": [{"age": 30.0}, {"age": None}]}).write_parquet(
        tmp_path / "users.parquet"
    )
    pl.DataFrame(
        {"user_id": [1, None], "product_id": ["p1", "p2"], "at": [datetime(2024, 3, 2, 10)] * 2}
    ).write_parquet(tmp_path / "events.parquet")
    source = jsonl.read(tmp_path)
    assert list(source.products) == [
        RawProduct(product_id="p1", title="Linen shirt", attributes={"fabric": "linen", "fit": "slim"}, price=19),
        RawProduct(product_id="p2", title="Coat"),
    ]
    assert list(source.users) == [User(user_id="1", profile={"age": 30}), User(user_id="2")]
    found = list(source.events)
    assert rejected(found) == [("events.parquet", 2, "user_id: missing")]
    assert pl.concat(accepted(found))["at"].to_list() == [datetime(2024, 3, 2, 10, tzinfo=UTC)]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"user_id": "u", "product_id": "p", "at": "2024-03-02", "contxt": "x"}, "events have no column contxt"),
        ({"user_id": "u", "at": "2024-03-02"}, "has no column product_id"),
    ],
)
def test_a_wrong_column_of_parquet_events_is_named(tmp_path, columns, said):
    pl.DataFrame([columns]).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(UserError, match=said):
        list(jsonl.read(tmp_path).events)


def test_jsonl_rejects_bad_rows_and_goes_on(shop):
    write_lines(
        shop / "products.jsonl",
        [
            {"product_id": "p1", "title": "Shirt"},
            {"title": "nameless"},
            {"product_id": "p3", "title": "Shoe", "price": "cheap"},
            "{",
            {"product_id": "p5", "title": "a\x00b"},
            {"product_id": "p6", "title": "Sock", "colour": "red"},
            {"product_id": "p7", "title": "Hat"},
        ],
    )
    found = list(jsonl.read(shop).products)
    assert [product.product_id for product in accepted(found)] == ["p1", "p7"]
    assert rejected(found) == [
        ("products.jsonl", 2, "product_id: missing"),
        ("products.jsonl", 3, "price: Input should be a valid number, unable to parse string as a number"),
        ("products.jsonl", 4, "row: not valid JSON"),
        ("products.jsonl", 5, "title: holds a NUL byte, which no text in PostgreSQL may"),
        ("products.jsonl", 6, "colour: Extra inputs are not permitted"),
    ]


def test_an_event_may_be_of_a_session(shop):
    session = {"session_id": "s1", "product_id": "p1", "at": "2024-03-04"}
    write_lines(shop / "events.jsonl", [EVENTS[0], session, {**session, "user_id": "session:s1"}])
    found = list(jsonl.read(shop).events)
    assert pl.concat(accepted(found))["user_id"].to_list() == ["u1", "session:s1"]
    ((_, line, reason),) = rejected(found)
    assert line == 3
    assert "kept for sessions" in reason


@pytest.mark.parametrize("odd", [{"user_id": 5}, {"user_id": "5", "colour": "red"}, "[]", {}])
def test_one_odd_event_leaves_the_events_beside_it(shop, odd):
    odd_row = odd if isinstance(odd, str) else {"product_id": "p1", "at": "2024-03-04", **odd}
    bad_day = {"user_id": "u9", "product_id": "p1", "at": "2024-02-30"}
    write_lines(shop / "events.jsonl", [EVENTS[0], odd_row, bad_day, EVENTS[1]])
    found = list(jsonl.read(shop).events)
    users = pl.concat(accepted(found))["user_id"].to_list()
    assert sorted(users) == (["5", "u1", "u1"] if odd == {"user_id": 5} else ["u1", "u1"])
    reasons = {line: reason for _, line, reason in rejected(found)}
    assert reasons.pop(3).startswith("at: ")
    assert list(reasons) == ([] if odd == {"user_id": 5} else [2])


def test_jsonl_uses_the_shops_schema_file(shop):
    schema = {"std": {"fabric": ["linen", "wool"]}, "re": ["fit"]}
    (shop / "schema.json").write_text(json.dumps(schema))
    source = jsonl.read(shop)
    assert source.schema == FeatureSchema(**schema)
    assert not source.schema_is_inferred
    assert source.notes == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "schema.json: file: Invalid JSON"), ('{"std": {"a": []}, "re": []}', r"\['a'\] allow no value")],
)
def test_a_bad_schema_file_stops_the_import(shop, text, said):
    (shop / "schema.json").write_text(text)
    with pytest.raises(UserError, match=said):
        jsonl.read(shop)


def test_jsonl_infers_which_fields_are_closed(tmp_path):
    write_lines(
        tmp_path / "products.jsonl",
        [
            {
                "product_id": str(number),
                "title": "x",
                "attributes": {"colour": ["Red", "red", "blue"][number % 3], "sizes": "S, M", "note": f"note {number}"},
            }
            for number in range(12)
        ]
        + ["not a row"],
    )
    before = sorted(tmp_path.iterdir())
    source = jsonl.read(tmp_path)
    assert source.schema == FeatureSchema(std={"colour": ["Red", "blue"], "sizes": ["M", "S"]}, re=["note"])
    assert source.schema_is_inferred
    assert "colour (2 values), sizes (2 values); open (RE): note" in source.notes[1]
    assert sorted(tmp_path.iterdir()) == before


def test_a_shop_of_titles_alone_gets_the_fields_that_they_speak_of(tmp_path):
    """Of the lexicon's; a field that an attribute means stays the attribute's, and what hardly any title says is no field."""
    titles = ["Red linen shirt", "린넨 원피스 - 블랙", "Slim fit wool trousers", "Blue dress"]
    rows = [
        {
            "product_id": str(n),
            "title": titles[n % 4],
            "description": "waterproof" if n == 7 else "",
            "attributes": {"Color": "Red"},
        }
        for n in range(200)
    ]
    write_lines(tmp_path / "products.jsonl", rows)
    source = jsonl.read(tmp_path)
    assert source.schema.std.keys() == {"Color", "category"}
    assert {"shirt", "dress", "t-shirt"} <= set(source.schema.std["category"])  # what no title names yet may come
    assert set(source.schema.re) == {"material", "fit"}
    assert "from titles and descriptions: closed (STD): category (" in source.notes[2]


@pytest.mark.parametrize("titles", [("Xqzt 4000", "Slim fit shirt"), ("Slim fit shirt", "Xqzt 4000")])
def test_fields_are_those_of_a_whole_catalogue_however_it_is_sorted(titles):
    rows = [
        RawProduct(product_id=f"{n}", title=titles[n // jsonl.READ_PRODUCTS]) for n in range(2 * jsonl.READ_PRODUCTS)
    ]
    _, spoken = jsonl.infer_schema(iter(rows), Lexicon.load(LEXICON))
    assert "category" in spoken.std
    assert spoken.re == ["fit"]


def test_titles_that_the_lexicon_does_not_know_make_no_schema(tmp_path):
    write_lines(tmp_path / "products.jsonl", [{"product_id": "1", "title": "Xqzt 4000"}])
    assert jsonl.read(tmp_path).schema is None


NO_WORDS = Lexicon(LexiconFile(fields={}))
values = st.lists(st.text("abAB ,-", max_size=4), max_size=3)
products = st.lists(st.dictionaries(st.sampled_from(["colour", "note", "size"]), values), max_size=30)


@given(products)
def test_an_inferred_schema_is_valid_and_covers_every_attribute_and_closed_value(attributes):
    rows = [RawProduct(product_id=str(n), title="x", attributes=given) for n, given in enumerate(attributes)]
    schema, _ = jsonl.infer_schema(iter(rows), NO_WORDS)
    assert set(schema.std) | set(schema.re) == {name for row in rows for name in row.attributes}
    for name, allowed in schema.std.items():
        parts = [
            normalise(part)
            for row in rows
            for value in row.attributes.get(name, [])
            for part in value.split(",")
            if normalise(part)
        ]
        assert {normalise(value) for value in allowed} == set(parts)
        assert len(allowed) == len(set(parts))
    assert schema == FeatureSchema.model_validate(schema.model_dump())


def test_jsonl_may_bring_events_alone(shop):
    (shop / "products.jsonl").unlink()
    source = jsonl.read(shop)
    assert source.schema is None
    assert list(source.products) == []
    assert len(events(source)) == 2


def test_jsonl_without_files_says_what_it_wants(tmp_path):
    with pytest.raises(UserError, match=r"has none of products, users, events .*docs/data\.md"):
        jsonl.read(tmp_path)
    with pytest.raises(UserError, match=r"expected a folder with products\.jsonl"):
        jsonl.read(None)
    with pytest.raises(UserError, match="nowhere"):
        jsonl.read(tmp_path / "nowhere")


# --- H&M


def article(article_id, **changes):
    return {
        "article_id": article_id,
        "product_code": article_id[:-3],
        "prod_name": "Parka",
        "detail_desc": "A warm parka.",
        **{column: f"some {field}" for field, column in hm.STD_COLUMNS.items()},
        **changes,
    }


def write_csv(file: Path, rows):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def bought(day, customer, article_id, price):
    return {"t_dat": day, "customer_id": customer, "article_id": article_id, "price": price, "sales_channel_id": 2}


PURCHASES = [
    bought("2020-01-05", "c1", "0123456001", 0.5),
    bought("2020-01-05", "c1", "0123456001", 0.3),
    bought("2020-01-06", "c2", "123456001", 0.1),
    bought("2020-01-07", "c2", "0123456002", 0.9),
]


@pytest.fixture
def hm_folder(tmp_path):
    write_csv(
        tmp_path / "articles.csv",
        [article("0123456001"), article("0123456002", detail_desc="", colour_group_name="Red"), article("0123456003")],
    )
    write_csv(tmp_path / "transactions_train.csv", PURCHASES)
    write_csv(tmp_path / "customers.csv", [{"customer_id": "c1", "age": "31"}, {"customer_id": "c2", "age": ""}])
    return tmp_path


def test_hm_articles_become_products_with_short_field_names(hm_folder):
    source = hm.read(hm_folder)
    assert source.schema is not None
    assert source.schema.std["colour"] == ["Red", "some colour"]
    assert list(source.schema.std) == list(hm.STD_COLUMNS)
    first, second, third = source.products
    assert first == RawProduct(
        product_id="0123456001",
        title="Parka",
        description="A warm parka.",
        attributes={field: f"some {field}" for field in hm.STD_COLUMNS},
        price=0.3,
        group_id="0123456",
    )
    assert isinstance(second, RawProduct)
    assert (second.description, second.attributes["colour"], second.price) == ("", ["Red"], 0.9)
    assert isinstance(third, RawProduct)
    assert third.price is None


def test_hm_prices_do_not_look_past_the_given_day(hm_folder):
    source = hm.read(hm_folder, prices_before=date(2020, 1, 6))
    assert [product.price for product in accepted(source.products)] == [0.4, None, None]


def test_hm_purchases_are_events_of_a_day_and_ids_are_padded(hm_folder):
    source = hm.read(hm_folder)
    found = pl.concat(accepted(source.events))
    assert found["line"].to_list() == [2, 3, 4, 5]
    assert found.select("user_id", "product_id", "kind", "at").rows() == [
        ("c1", "0123456001", "purchase", datetime(2020, 1, 5, tzinfo=UTC)),
        ("c1", "0123456001", "purchase", datetime(2020, 1, 5, tzinfo=UTC)),
        ("c2", "0123456001", "purchase", datetime(2020, 1, 6, tzinfo=UTC)),
        ("c2", "0123456002", "purchase", datetime(2020, 1, 7, tzinfo=UTC)),
    ]
    assert found["event_id"].n_unique() == 3
    assert list(source.users) == [User(user_id="c1", profile={"age": 31}), User(user_id="c2")]


def test_hm_parquet_with_numbers_and_dates_means_the_same(hm_folder):
    text = hm.read(hm_folder)
    expected = (text.schema, list(text.products), events(text))
    pl.read_csv(hm_folder / "articles.csv").write_parquet(hm_folder / "articles.parquet")
    pl.read_csv(hm_folder / "transactions_train.csv", try_parse_dates=True).write_parquet(
        hm_folder / "transactions.parquet"
    )
    for name in ("articles.csv", "transactions_train.csv"):
        (hm_folder / name).unlink()
    typed = hm.read(hm_folder)
    assert (typed.schema, list(typed.products), events(typed)) == expected


def test_hm_bad_rows_are_named_by_the_files_columns(hm_folder):
    with (hm_folder / "articles.csv").open("a") as stream:
        stream.write("0123456009,short\n")
    write_csv(
        hm_folder / "transactions_train.csv",
        [
            *PURCHASES[:1],
            bought("2020-02-30", "c1", "0123456001", 0.5),
            bought("2020-01-05", "", "0123456001", 0.5),
            bought("2020-01-05", "c1", "", 0.5),
            bought("1969-12-31", "c1", "0123456001", 0.5),
            bought("2020-01-08", "c9", "0123456001", "free"),
        ],
    )
    source = hm.read(hm_folder)
    assert rejected(source.products) == [("articles.csv", 5, "row: 2 columns where the heading has 15")]
    found = list(source.events)
    assert [(line, reason.split(":")[0]) for _, line, reason in rejected(found)] == [
        (3, "t_dat"),
        (4, "customer_id"),
        (5, "article_id"),
        (6, "t_dat"),
    ]
    assert pl.concat(accepted(found))["user_id"].to_list() == ["c1", "c9"]


def test_hm_says_which_file_or_column_is_missing(hm_folder):
    with pytest.raises(UserError, match=r"needs a folder with articles\.csv .*Kaggle: 'H&M Personalized Fashion"):
        hm.read(None)
    (hm_folder / "transactions_train.csv").write_text("t_dat,customer_id,article_id\n")
    with pytest.raises(UserError, match=r"transactions_train\.csv has no column price"):
        list(hm.read(hm_folder).products)
    (hm_folder / "transactions_train.csv").unlink()
    with pytest.raises(UserError, match=r"has no transactions_train\.csv .*Kaggle"):
        hm.read(hm_folder)


# --- Rent the Runway


def rental(user, item, **changes):
    return {
        "fit": "fit", "user_id": user, "bust size": "34d", "item_id": item, "weight": "150lbs", "rating": "10",
        "rented for": "party", "review_text": "so nice", "body type": "straight & narrow", "review_summary": "nice",
        "category": "gown", "height": "5' 6\"", "size": 12, "age": "28", "review_date": "April 20, 2016", **changes,
    }  # fmt: skip


def test_rentals_become_products_renters_and_events(tmp_path):
    write_lines(
        tmp_path / "renttherunway_final_data.json",
        [
            rental("7", "100"),
            rental("7", "200", category="top", age="5", weight="160lbs", **{"rented for": "work"}),
            rental("8", "100", age="116", height=None, weight=None, **{"bust size": None, "body type": None}),
        ],
    )
    source = rent_the_runway.read(tmp_path)
    assert source.schema == FeatureSchema(std={"category": ["gown", "top"]}, re=[])
    assert list(source.products) == [
        RawProduct(product_id="100", title="gown", attributes={"category": "gown"}),
        RawProduct(product_id="200", title="top", attributes={"category": "top"}),
    ]
    body = {"height_cm": 167.6, "weight_kg": 70.3, "age": 28, "bust_size": 34, "body_straight_narrow": 1}
    assert list(source.users) == [User(user_id="7", profile=body), User(user_id="8")]
    day = datetime(2016, 4, 20, tzinfo=UTC)
    assert events(source) == [
        ("7", "100", "purchase", day, "party"),
        ("7", "200", "purchase", day, "work"),
        ("8", "100", "purchase", day, "party"),
    ]


def test_rentals_as_parquet_mean_the_same(tmp_path):
    pl.DataFrame(
        {
            "user_id": [7, 8],
            "item_id": [100, 100],
            "category": ["gown", "gown"],
            "rented_for": pl.Series(["party", None], dtype=pl.Categorical),
            "review_date": [datetime(2016, 4, 20), datetime(2016, 4, 21)],
            "body_type": pl.Series(["full bust", None], dtype=pl.Categorical),
            "age": [28.0, 117.0],
            "weight_lbs": [150.0, None],
            "height_in": [66.0, None],
            "bust_size_num": [34.0, None],
            "rating": [10.0, 2.0],
        }
    ).write_parquet(tmp_path / "rentals.parquet")
    source = rent_the_runway.read(tmp_path)
    assert list(source.products) == [RawProduct(product_id="100", title="gown", attributes={"category": "gown"})]
    body = {"height_cm": 167.6, "weight_kg": 68.0, "age": 28, "bust_size": 34, "body_full_bust": 1}
    assert list(source.users) == [User(user_id="7", profile=body), User(user_id="8")]
    assert events(source) == [
        ("7", "100", "purchase", datetime(2016, 4, 20, tzinfo=UTC), "party"),
        ("8", "100", "purchase", datetime(2016, 4, 21, tzinfo=UTC), ""),
    ]


def test_nothing_computed_from_rentals_reaches_a_product(tmp_path):
    """Ratings, fits and how often an item went out would tell a model what comes after its training days."""
    file = tmp_path / "renttherunway_final_data.json"
    write_lines(file, [rental("7", "100")])
    once = list(rent_the_runway.read(file).products)
    write_lines(file, [rental(str(n), "100", rating="2", fit="small", size=n) for n in range(9)])
    assert list(rent_the_runway.read(file).products) == once


def test_bad_rentals_are_rejected_and_an_unreadable_number_keeps_the_rental(tmp_path):
    write_lines(
        tmp_path / "renttherunway_final_data.json",
        [
            rental("7", "100"),
            rental("8", "100", review_date="February 30, 2016"),
            rental(None, "100"),
            rental("9", None),
            rental("10", "100", weight="heavy"),
            rental(["11"], "100"),
            "{broken",
            rental("12", "300", category=None),
        ],
    )
    source = rent_the_runway.read(tmp_path)
    found = list(source.products)
    assert [product.product_id for product in accepted(found)] == ["100"]
    assert rejected(found) == [("renttherunway_final_data.json", 8, "category: missing")]
    rentals = list(source.events)
    reasons = {line: reason for _, line, reason in rejected(rentals)}
    assert reasons.pop(2).startswith("review_date: ")
    assert reasons == {
        3: "user_id: missing",
        4: "item_id: missing",
        5: "weight: no number to be read in it",
        6: "user_id: neither text nor a number",
        7: "row: not valid JSON",
    }
    assert pl.concat(accepted(rentals))["user_id"].to_list() == ["7", "10", "12"]
    assert "weight_kg" not in {user.user_id: user for user in accepted(source.users)}["10"].profile


def test_rentals_missing_are_named_with_their_origin(tmp_path):
    with pytest.raises(UserError, match=r"rentals\.parquet .*McAuley"):
        rent_the_runway.read(tmp_path)


# --- Myntra


def style(number, **changes):
    return {
        "id": number, "productDisplayName": "Kite Women Green Dress", "brandName": "Kite", "gender": "Women",
        "ageGroup": "Adults-Women", "baseColour": "Green", "season": "NA", "usage": None, "price": 899,
        "catalogAddDate": 1400000000, "masterCategory": "Apparel", "subCategory": "Dress", "articleType": "Dresses",
        "articleAttributes": {"Sleeve Length": "Short", "Add-Ons": "Belt", "Fit": "NA", "Brand": "Kite Kids"},
        "productDescriptors": {"description": "<p>Light &amp; airy</p>", "style_note": "<b>Picnic</b>"}, **changes,
    }  # fmt: skip


DRESS = RawProduct(
    product_id="5",
    title="Kite Women Green Dress",
    description="<p>Light &amp; airy</p>\n<b>Picnic</b>",
    attributes={
        "brand": "Kite", "gender": "Women", "age_group": "Adults-Women", "colour": "Green", "category": "Dresses",
        "sub_category": "Dress", "master_category": "Apparel", "sleeve_length": "Short", "add_ons": "Belt",
        "article_brand": "Kite Kids",
    },
    price=899,
    arrived_at=datetime(2014, 5, 13, 16, 53, 20, tzinfo=UTC),
)  # fmt: skip


def test_myntra_styles_become_products_with_their_html_kept(tmp_path):
    write_lines(tmp_path / "styles.jsonl", [style(5)])
    source = myntra.read(tmp_path)
    assert list(source.products) == [DRESS]
    assert source.schema is not None
    assert source.schema.std["category"] == ["Dresses"]
    assert "season" not in source.schema.std
    assert source.schema.re == ["sleeve_length", "add_ons", "article_brand"]


def test_myntra_takes_the_public_folder_with_its_wrapped_values(tmp_path):
    styles = tmp_path / "styles"
    styles.mkdir()
    wrapped = style(
        5,
        masterCategory={"id": 9, "typeName": "Apparel"},
        subCategory={"id": 2, "typeName": "Dress"},
        articleType={"id": 1, "typeName": "Dresses"},
        productDescriptors={
            "description": {"descriptorType": "description", "value": "<p>Light &amp; airy</p>"},
            "style_note": {"descriptorType": "style_note", "value": "<b>Picnic</b>"},
        },
    )
    (styles / "5.json").write_text(json.dumps({"meta": {"code": 200}, "data": wrapped}))
    (styles / "6.json").write_text("{")
    for path in (tmp_path, styles):
        found = list(myntra.read(path).products)
        assert accepted(found) == [DRESS]
        assert rejected(found) == [("6.json", 1, "row: not valid JSON")]


def test_myntra_bad_rows_are_named_by_the_files_columns(tmp_path):
    write_lines(
        tmp_path / "styles.jsonl",
        [
            style(None),
            style(2, productDisplayName=None),
            style(3, price="cheap"),
            style(4, catalogAddDate=5),
            style(5, articleAttributes=["red"]),
            style(6, productDescriptors="<p>plain</p>"),
            style(7, productDescriptors=7),
        ],
    )
    found = list(myntra.read(tmp_path).products)
    assert [(line, reason.split(":")[0]) for _, line, reason in rejected(found)] == [
        (1, "id"),
        (2, "productDisplayName"),
        (3, "price"),
        (4, "catalogAddDate"),
        (5, "articleAttributes"),
        (7, "productDescriptors"),
    ]
    assert [product.description for product in accepted(found)] == ["<p>plain</p>"]


def test_myntra_missing_is_named_with_its_origin(tmp_path):
    with pytest.raises(UserError, match=r"styles\.jsonl.*Kaggle: 'Fashion Product Images Dataset'"):
        myntra.read(tmp_path)


# --- AI-Hub


def garment(product_id, clothes, reinforced):
    return {"product_id": product_id, "feature_data": {"clothes": clothes, "reinforced_feature_value": reinforced}}


def test_aihub_features_come_with_the_products(tmp_path):
    write_lines(
        tmp_path / "products.jsonl",
        [
            garment(
                1,
                {"category": "02top_03sweater", "color": "Red, Blue", "size": {"chest": "98.0"}, "top.hem": "90.0"},
                {
                    "category": "soft_wool_knit",
                    "fit.vibe": "Relaxed",
                    "structural": {"flow": {"hem": "Wide/Bell"}, "x": None},
                },
            ),
            garment(2, {"category": "01outer_01coat", "color": "red"}, {"fabric.feature": "Normal_Wool"}),
        ],
    )
    source = aihub.read(tmp_path)
    assert source.schema == FeatureSchema(
        std={"category": ["01outer_01coat", "02top_03sweater"], "color": ["Blue", "Red"]},
        re=["reinforced.category", "fit.vibe", "structural.flow.hem", "fabric.feature"],
    )
    first, second = source.products
    assert isinstance(first, RawProduct)
    assert first.title == "soft wool knit"
    assert first.attributes == {
        "category": ["02top_03sweater"], "color": ["Red, Blue"], "size.chest": ["98.0"], "top.hem": ["90.0"],
    }  # fmt: skip
    assert isinstance(second, RawProduct)
    assert second.title == "outer coat, Normal Wool"
    knit, coat = accepted(source.features)
    assert knit.std == {"category": ["02top_03sweater"], "color": ["Red", "Blue"]}
    assert knit.re == {
        "reinforced.category": ["soft_wool_knit"],
        "fit.vibe": ["Relaxed"],
        "structural.flow.hem": ["Wide/Bell"],
    }
    assert coat.std["color"] == ["Red"]  # one spelling for one value
    assert coat.title == second.title


def test_aihub_bad_rows_are_reported_once(tmp_path):
    write_lines(
        tmp_path / "products.jsonl",
        [
            garment(None, {"category": "02top_03sweater"}, {}),
            garment(2, "red", {}),
            garment(3, {"color": [True]}, {}),
            garment(4, {}, {}),
            {"product_id": 5},
            "nonsense",
            garment(7, {"category": "02top_03sweater"}, {}),
            garment(8, {"category": "02top_03sweater"}, {"fit.vibe": "a\x00b"}),
            {"product_id": 9, "feature_data": [1]},
        ],
    )
    source = aihub.read(tmp_path / "products.jsonl")
    found = list(source.products)
    assert [(line, reason) for _, line, reason in rejected(found)] == [
        (1, "product_id: missing"),
        (2, "clothes: Input should be a valid dictionary"),
        (3, "clothes.color: Input should be a valid string"),
        (4, "title: missing"),
        (5, "title: missing"),
        (6, "row: not valid JSON"),
        (8, "reinforced_feature_value.fit.vibe: holds a NUL byte, which no text in PostgreSQL may"),
        (9, "feature_data: not a JSON object"),
    ]
    assert [features.product_id for features in accepted(source.features)] == ["7"]


def test_aihub_missing_is_named_with_its_origin(tmp_path):
    with pytest.raises(UserError, match=r"has no products\.jsonl .*AI-Hub"):
        aihub.read(tmp_path)


# --- S3-Rec


def s3rec_folder(folder: Path, sequences: list[str], attributes) -> Path:
    (folder / "Beauty.txt").write_text("".join(f"{line}\n" for line in sequences))
    (folder / "Beauty_item2attributes.json").write_text(json.dumps(attributes))
    return folder


def test_s3rec_sequences_end_on_one_day_in_their_order(tmp_path):
    source = s3rec.read(s3rec_folder(tmp_path, ["1 5 3 4", "2 3"], {"3": [7], "4": [7], "5": [7]}))
    assert events(source) == [
        ("1", "3", "purchase", datetime(1999, 12, 31, tzinfo=UTC), ""),
        ("1", "4", "purchase", datetime(2000, 1, 1, tzinfo=UTC), ""),
        ("1", "5", "purchase", datetime(1999, 12, 30, tzinfo=UTC), ""),
        ("2", "3", "purchase", datetime(2000, 1, 1, tzinfo=UTC), ""),
    ]


def test_s3rec_attributes_are_one_closed_field_the_rarest_first_and_no_title_holds_a_number(tmp_path):
    source = s3rec.read(s3rec_folder(tmp_path, ["1 3 4"], {"3": [7, 8, 9, 8], "4": [7, 8], "5": [7]}))
    assert source.schema == FeatureSchema(std={"attribute": ["7", "8", "9"]}, re=[])
    assert list(source.products) == [
        RawProduct(product_id="3", title="beauty product", attributes={"attribute": ["9", "8", "7"]}),
        RawProduct(product_id="4", title="beauty product", attributes={"attribute": ["8", "7"]}),
        RawProduct(product_id="5", title="beauty product", attributes={"attribute": ["7"]}),
    ]


def test_s3rec_bad_rows_are_rejected_and_the_others_stay(tmp_path):
    attributes = {"3": [7], "4": [[7]], "5": {"a": 7}, "6": [7], " ": [7]}
    source = s3rec.read(s3rec_folder(tmp_path, ["1 3 6", "", "2", f"{'9' * 300} 3"], attributes))
    found = list(source.products)
    assert [product.product_id for product in accepted(found)] == ["3", "6"]
    assert [(line, reason.split(":")[0]) for _, line, reason in rejected(found)] == [
        (2, "attributes.attribute"),
        (3, "attributes.attribute"),
        (5, "product_id"),
    ]
    found = list(source.events)
    assert [(line, reason.split(":")[0]) for _, line, reason in rejected(found)] == [
        (2, "row"), (3, "row"), (4, "user_id"),
    ]  # fmt: skip
    assert pl.concat(accepted(found))["product_id"].to_list() == ["3", "6"]


def test_s3rec_missing_or_broken_files_are_named_with_their_origin(tmp_path):
    with pytest.raises(UserError, match=r"has no Beauty\.txt; .*S3-Rec"):
        s3rec.read(tmp_path)
    s3rec_folder(tmp_path, ["1 3"], [])
    with pytest.raises(UserError, match=r"attributes\.json is not a JSON object of item to attributes"):
        s3rec.read(tmp_path)
    (tmp_path / "Beauty_item2attributes.json").write_text("{")
    with pytest.raises(UserError, match=r"attributes\.json is not valid JSON"):
        s3rec.read(tmp_path)
    (tmp_path / "Beauty_item2attributes.json").unlink()
    with pytest.raises(UserError, match=r"has no Beauty_item2attributes\.json; .*S3-Rec"):
        s3rec.read(tmp_path)


# --- values that would break a schema or a table


def test_a_closed_value_that_no_product_may_have_stays_out_of_the_schema(hm_folder):
    with (hm_folder / "articles.csv").open("a", newline="") as stream:
        bad = article("0123456009", colour_group_name="a\x00b")
        csv.DictWriter(stream, list(bad)).writerow(bad)
    source = hm.read(hm_folder)
    assert source.schema is not None
    assert source.schema.std["colour"] == ["Red", "some colour"]
    reason = "attributes.colour: holds a NUL byte, which no text in PostgreSQL may"
    assert rejected(source.products) == [("articles.csv", 5, reason)]


def test_parquet_attributes_may_be_a_map_and_nonsense_is_rejected(tmp_path):
    attributes = pa.array([[("fit", ["slim"]), ("fabric", None)], None], pa.map_(pa.string(), pa.list_(pa.string())))
    table = pa.table({"product_id": ["1", "2"], "title": ["x", "y"], "attributes": attributes})
    pq.write_table(table, tmp_path / "products.parquet")
    assert [product.attributes for product in accepted(jsonl.read(tmp_path).products)] == [{"fit": ["slim"]}, {}]
    pq.write_table(table.set_column(2, "attributes", pa.array(["slim", None])), tmp_path / "products.parquet")
    source = jsonl.read(tmp_path)
    assert source.schema is None
    found = list(source.products)
    assert rejected(found) == [("products.parquet", 1, "attributes: Input should be a valid dictionary")]
    assert [product.product_id for product in accepted(found)] == ["2"]


def test_gzipped_hm_tables_mean_the_same(hm_folder):
    text = hm.read(hm_folder)
    expected = (text.schema, list(text.products), events(text))
    for name in ("articles.csv", "transactions_train.csv"):
        (hm_folder / f"{name}.gz").write_bytes(gzip.compress((hm_folder / name).read_bytes()))
        (hm_folder / name).unlink()
    packed = hm.read(hm_folder)
    assert (packed.schema, list(packed.products), events(packed)) == expected


def test_a_file_without_rentals_is_an_empty_source(tmp_path):
    (tmp_path / "renttherunway_final_data.json").write_text("")
    source = rent_the_runway.read(tmp_path)
    assert (source.schema, list(source.products), events(source)) == (None, [], [])
