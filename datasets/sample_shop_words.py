"""The vocabulary of the sample shop: how its sellers write each feature value, in English and in Korean.

`WORDS[field][canonical value]` lists the spellings, the usual one first; RE values are in the vocabulary's normal spelling.
`UNLISTED` holds words that the sellers use now and then and that `lexicon.json` leaves out on purpose: reading them takes
more than looking them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Words(NamedTuple):
    english: tuple[str, ...]
    korean: tuple[str, ...]


def _words(english: str, korean: str) -> Words:
    return Words(tuple(english.split(", ")), tuple(korean.split(", ")))


def _table(text: str) -> dict[str, Words]:
    """One value a line: `canonical | english, spellings | korean, spellings`."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    return {canonical: _words(english, korean) for canonical, english, korean in rows}


WORDS: dict[str, dict[str, Words]] = {
    "category": _table("""
        t-shirt    | t-shirt, tee                     | 티셔츠, 반팔티
        shirt      | shirt, button-down shirt         | 셔츠, 남방
        blouse     | blouse                           | 블라우스
        sweater    | sweater, jumper, knit top        | 니트, 스웨터
        sweatshirt | sweatshirt, hoodie               | 맨투맨, 후드티
        cardigan   | cardigan                         | 가디건, 카디건
        jeans      | jeans                            | 청바지, 데님 팬츠
        trousers   | trousers, pants, slacks          | 슬랙스, 바지, 팬츠
        shorts     | shorts                           | 반바지, 쇼츠
        skirt      | skirt                            | 스커트, 치마
        leggings   | leggings                         | 레깅스
        dress      | dress, midi dress                | 원피스, 드레스
        jumpsuit   | jumpsuit, overalls               | 점프수트, 멜빵바지
        jacket     | jacket, blouson                  | 자켓, 재킷, 점퍼
        blazer     | blazer, suit jacket              | 블레이저, 정장 자켓
        coat       | coat, trench coat                | 코트, 트렌치코트
        puffer     | puffer jacket, padded jacket     | 패딩, 패딩 점퍼
        sneakers   | sneakers, trainers               | 스니커즈, 운동화
        boots      | boots, ankle boots               | 부츠, 앵클부츠
        sandals    | sandals                          | 샌들
        loafers    | loafers                          | 로퍼
        heels      | heels, pumps                     | 하이힐, 펌프스
        bag        | tote bag, shoulder bag           | 토트백, 숄더백
        backpack   | backpack                         | 백팩
        hat        | hat, cap                         | 모자, 볼캡
        swimwear   | swimsuit, swimwear               | 수영복
    """),
    "gender": _table("""
        women  | women, women's, ladies  | 여성, 여자
        men    | men, men's              | 남성, 남자
        unisex | unisex                  | 남녀공용, 유니섹스
    """),
    "colour": _table("""
        black    | black            | 블랙, 검정
        white    | white            | 화이트, 흰색
        ivory    | ivory            | 아이보리
        beige    | beige, sand      | 베이지
        grey     | grey, gray       | 그레이, 회색
        navy     | navy             | 네이비, 남색
        blue     | blue, sky blue   | 블루, 파란색
        green    | green            | 그린, 초록
        khaki    | khaki, olive     | 카키
        brown    | brown, camel     | 브라운, 갈색
        red      | red              | 레드, 빨강
        burgundy | burgundy, wine   | 버건디, 와인
        pink     | pink             | 핑크, 분홍
        purple   | purple, lavender | 퍼플, 보라
        yellow   | yellow           | 옐로우, 노랑
        orange   | orange           | 오렌지, 주황
    """),
    "season": _table("""
        spring | spring          | 봄, 스프링
        summer | summer          | 여름, 썸머
        autumn | autumn, fall    | 가을
        winter | winter          | 겨울, 윈터
    """),
    "pattern": _table("""
        solid   | solid, plain          | 무지, 단색
        striped | striped, stripe       | 스트라이프, 줄무늬
        checked | checked, plaid        | 체크, 체크무늬
        floral  | floral                | 플로럴, 꽃무늬
        dotted  | polka dot, dotted     | 도트, 땡땡이
        animal  | leopard, animal print | 레오파드, 호피
        graphic | graphic, printed      | 그래픽, 프린팅
        paisley | paisley               | 페이즐리
    """),
    "price_band": _table("""
        budget  | budget             | 가성비
        mid     | mid-range          | 중가
        premium | premium            | 프리미엄
        luxury  | luxury             | 럭셔리
    """),
    "material": _table("""
        cotton       | cotton                    | 코튼, 면
        linen        | linen                     | 린넨, 리넨
        wool         | wool                      | 울, 양모
        cashmere     | cashmere                  | 캐시미어
        denim        | denim                     | 데님
        leather      | leather                   | 가죽, 레더
        suede        | suede                     | 스웨이드
        silk         | silk                      | 실크
        satin        | satin                     | 새틴
        chiffon      | chiffon                   | 쉬폰, 시폰
        polyester    | polyester                 | 폴리에스터, 폴리
        nylon        | nylon                     | 나일론
        rayon        | rayon, viscose            | 레이온
        corduroy     | corduroy                  | 코듀로이, 골덴
        fleece       | fleece                    | 플리스, 기모
        tencel       | tencel, lyocell           | 텐셀
        canvas       | canvas                    | 캔버스
        mesh         | mesh                      | 메쉬
        down         | down                      | 덕다운, 다운
        tweed        | tweed                     | 트위드
    """),
    "fit": _table("""
        oversized | oversized, oversize      | 오버핏, 오버사이즈
        relaxed   | relaxed, loose           | 루즈핏, 여유핏
        regular   | regular-fit, regular     | 레귤러핏, 기본핏
        slim      | slim, slim-fit           | 슬림핏, 슬림
        wide      | wide-leg, wide           | 와이드, 와이드핏
        straight  | straight, straight-leg   | 일자핏, 스트레이트
        cropped   | cropped, crop            | 크롭, 크롭핏
        long      | long, longline           | 롱, 롱기장
        petite    | petite                   | 쁘띠, 키작녀
        a line    | a-line                   | A라인, 에이라인
        tailored  | tailored                 | 테일러드, 정핏
    """),
    "style": _table("""
        minimal  | minimal, minimalist     | 미니멀, 심플
        casual   | casual                  | 캐주얼
        street   | street, streetwear      | 스트릿
        classic  | classic                 | 클래식
        romantic | romantic                | 로맨틱
        sporty   | sporty, athleisure      | 스포티, 애슬레저
        vintage  | vintage, retro          | 빈티지, 레트로
        preppy   | preppy                  | 프레피
        bohemian | bohemian, boho          | 보헤미안, 에스닉
        outdoor  | outdoor, gorpcore       | 아웃도어, 고프코어
    """),
    "detail": _table("""
        pocket      | pocket                 | 포켓, 주머니
        button      | button                 | 버튼, 단추
        zip         | zip, zipper            | 지퍼, 집업
        hood        | hood                   | 후드
        pleats      | pleats, pleated        | 플리츠, 주름
        ruffle      | ruffle, frill          | 러플, 프릴
        lace        | lace                   | 레이스
        embroidery  | embroidery             | 자수
        belt        | belt, belted           | 벨트
        slit        | slit                   | 슬릿, 트임
        drawstring  | drawstring             | 스트링
        ribbed      | ribbed, rib            | 골지, 립
        puff sleeve | puff sleeve            | 퍼프 소매, 퍼프
        high waist  | high waist, high-rise  | 하이웨이스트
        platform    | platform               | 플랫폼, 통굽
        bow         | bow, ribbon            | 리본
        chain       | chain                  | 체인
        pearl       | pearl                  | 진주
        quilted     | quilted, quilting      | 퀼팅
        logo        | logo                   | 로고
    """),
    "function": _table("""
        breathable        | breathable                  | 통기성
        waterproof        | waterproof                  | 방수
        windproof         | windproof                   | 방풍
        stretch           | stretchy, stretch           | 신축성, 스판
        quick dry         | quick-dry, quick-drying     | 속건
        warm              | warm, insulated             | 보온성, 보온
        lightweight       | lightweight                 | 경량, 초경량
        uv protection     | uv protection               | 자외선 차단, UV 차단
        wrinkle resistant | wrinkle-resistant           | 구김 방지, 링클프리
        cooling           | cooling                     | 냉감, 쿨링
        moisture wicking  | moisture-wicking            | 흡습
        non slip          | non-slip                    | 미끄럼 방지, 논슬립
    """),
    "occasion": _table("""
        wedding guest | wedding guest          | 결혼식 하객룩, 하객룩
        office        | office                 | 오피스룩, 출근룩
        vacation      | vacation, beach        | 바캉스룩, 휴양지
        hiking        | hiking                 | 등산, 하이킹
        gym           | gym, workout           | 헬스장, 짐웨어
        date          | date night             | 데이트룩
        interview     | interview              | 면접룩, 면접
        daily         | everyday, daily        | 데일리룩, 데일리
    """),
    "neckline": _table("""
        crew neck    | crew neck, round neck       | 라운드넥, 크루넥
        v neck       | v-neck                      | 브이넥, V넥
        turtleneck   | turtleneck, mock neck       | 터틀넥, 목폴라
        collared     | collared                    | 카라넥, 카라
        square neck  | square neck                 | 스퀘어넥
        off shoulder | off-shoulder                | 오프숄더
        halter       | halter neck, halter         | 홀터넥
        stand collar | stand collar, band collar   | 스탠드카라, 차이나카라
    """),
    "mood": _table("""
        chic      | chic         | 시크
        lovely    | lovely       | 러블리
        cosy      | cosy, cozy   | 포근
        modern    | modern       | 모던
        elegant   | elegant      | 우아, 엘레강스
        hip       | hip          | 힙
        calm      | calm         | 차분
        luxurious | luxurious    | 고급스러운
        youthful  | youthful     | 발랄
    """),
}

STD_FIELDS = ("category", "gender", "brand", "colour", "season", "price_band", "pattern")
RE_FIELDS = ("material", "fit", "style", "detail", "function", "occasion", "neckline", "mood")

UNLISTED: dict[str, dict[str, Words]] = {
    "colour": _table("""
        ivory    | eggshell        | 크림빛
        navy     | midnight        | 미드나잇
        burgundy | oxblood         | 자줏빛
        pink     | blush           | 복숭아빛
        grey     | ash             | 잿빛
    """),
    "material": _table("""
        linen     | flax             | 아마
        wool      | merino           | 메리노
        denim     | selvedge         | 셀비지
        cotton    | pima             | 피마
        nylon     | ripstop          | 립스탑
    """),
    "fit": _table("""
        oversized | boyfriend-cut   | 박시
        wide      | palazzo         | 통바지핏
        relaxed   | slouchy         | 낙낙한 핏
        slim      | body-skimming   | 바디핏
    """),
    "style": _table("""
        minimal | understated     | 군더더기 없는
        street  | skater          | 스케이터
        classic | timeless        | 올드머니
    """),
    "occasion": _table("""
        hiking   | trail            | 트레킹
        vacation | resort           | 호캉스
        gym      | pilates          | 필라테스
        office   | boardroom        | 비즈니스
    """),
}


@dataclass(frozen=True)
class Brand:
    name: str
    korean: str
    tier: int  # 0 budget .. 3 luxury
    styles: tuple[str, str]  # what the brand is known for


def _brands(text: str) -> list[Brand]:
    rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    return [Brand(name, korean, int(tier), (first, second)) for name, korean, tier, first, second in rows]


# Invented names; a resemblance to a real label is an accident.
BRANDS = _brands("""
    Dalbit Basics   | 달빛베이직   | 0 | minimal  | casual
    Moa Daily       | 모아데일리   | 0 | casual   | romantic
    Onul            | 오늘옷       | 0 | casual   | minimal
    Pipkin          | 핍킨         | 0 | preppy   | casual
    Kkum            | 꿈옷장       | 0 | romantic | vintage
    Rundal          | 런달         | 0 | sporty   | casual
    Backlot         | 백랏         | 0 | street   | casual
    Yeoreum Closet  | 여름클로젯   | 0 | bohemian | romantic
    Tteutap         | 뜻앞         | 0 | street   | sporty
    Common Thread   | 커먼스레드   | 0 | casual   | classic
    Plainfolk       | 플레인포크   | 1 | minimal  | classic
    Urban Moth      | 어반모스     | 1 | street   | vintage
    Linden Row      | 린든로우     | 1 | classic  | preppy
    Haneul Studio   | 하늘스튜디오 | 1 | romantic | minimal
    Northfell       | 노스펠       | 1 | outdoor  | sporty
    Kito Works      | 키토웍스     | 1 | vintage  | casual
    Baram           | 바람상점     | 1 | bohemian | casual
    Ninefold        | 나인폴드     | 1 | street   | minimal
    Salt Pier       | 솔트피어     | 1 | casual   | preppy
    Bomnal          | 봄날의옷     | 1 | romantic | classic
    Gear Maru       | 기어마루     | 1 | outdoor  | street
    Fitlab Seoul    | 핏랩서울     | 1 | sporty   | street
    Harbor Prep     | 하버프렙     | 1 | preppy   | classic
    Mulberry Lane   | 멀베리레인   | 1 | vintage  | romantic
    Noon Atelier    | 눈아틀리에   | 2 | minimal  | romantic
    Maison Haru     | 메종하루     | 2 | classic  | romantic
    Seoraon         | 서라온       | 2 | minimal  | classic
    Alder Peak      | 앨더피크     | 2 | outdoor  | minimal
    Studio Gyeol    | 스튜디오결   | 2 | minimal  | street
    Westerly        | 웨스털리     | 2 | preppy   | vintage
    Ballet Archive  | 발레아카이브 | 2 | romantic | sporty
    Kanto Denim     | 칸토데님     | 2 | vintage  | street
    Motion Eight    | 모션에잇     | 2 | sporty   | outdoor
    Terra Sol       | 테라솔       | 2 | bohemian | classic
    Blackwell Tailors | 블랙웰테일러 | 2 | classic | preppy
    Atelier Onda    | 아틀리에온다 | 3 | romantic | bohemian
    Vesper Milano   | 베스퍼밀라노 | 3 | classic  | minimal
    Hwarang Couture | 화랑쿠튀르   | 3 | classic  | romantic
    Nuage Noir      | 누아주누아   | 3 | minimal  | street
    Summit Reserve  | 서밋리저브   | 3 | outdoor  | classic
""")

WORDS["brand"] = {brand.name: Words((brand.name,), (brand.korean,)) for brand in BRANDS}

# How shoppers say what they are shopping for, by the occasion meant.
CONTEXTS: dict[str, tuple[str, ...]] = {
    "wedding guest": ("결혼식 하객룩", "wedding guest outfit", "친구 결혼식에 입을 옷"),
    "office": ("office look", "출근룩", "매일 입을 오피스룩"),
    "vacation": ("beach vacation", "여름 바캉스룩", "휴양지에서 입을 옷"),
    "hiking": ("weekend hiking", "주말 등산", "등산 갈 때 입을 옷"),
    "gym": ("gym", "헬스장 운동복", "workout clothes"),
    "date": ("date night", "데이트룩", "주말 데이트"),
    "interview": ("formal interview", "면접룩", "면접 정장"),
}

# The names sellers give the same attribute, by the language of the listing.
ATTRIBUTE_NAMES: dict[str, Words] = {
    "category": _words("category, type, Product Type", "카테고리, 종류, 상품종류"),
    "gender": _words("gender, Gender", "성별"),
    "brand": _words("brand, Brand", "브랜드"),
    "colour": _words("color, Colour, colour", "색상, 컬러"),
    "season": _words("season, Season", "계절, 시즌"),
    "price_band": _words("price range", "가격대"),
    "pattern": _words("pattern, Pattern", "패턴, 무늬"),
    "material": _words("material, Material, fabric", "소재, 원단"),
    "fit": _words("fit, Fit", "핏"),
    "style": _words("style, Style", "스타일"),
    "detail": _words("detail, details", "디테일"),
    "function": _words("function, features", "기능"),
    "occasion": _words("occasion", "용도"),
    "neckline": _words("neckline, neck", "넥라인"),
    "mood": _words("mood", "무드"),
}
